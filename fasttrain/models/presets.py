"""The published sizes, and one of each family for CPUs: a line a preset. The data gives input size, channels and classes."""

from fasttrain.models.architecture import MODELS

# The Min-SNR paper's ViTs. S and L/4 are meant for 64-pixel images, B and XL for 32x32 latents.
# The paper gives S 6 heads, which do not divide a width of 512; 8 heads of 64 have the same number of parameters.
MODELS.preset("vit-s/4", "vit", depth=13, width=512, heads=8, patch=4, num_classes=0)
MODELS.preset("vit-b/2", "vit", depth=12, width=768, heads=12, patch=2)
MODELS.preset("vit-l/4", "vit", depth=21, width=1024, heads=16, patch=4)
MODELS.preset("vit-xl/2", "vit", depth=28, width=1152, heads=16, patch=2)
MODELS.preset("vit-tiny", "vit", depth=4, width=128, heads=4, patch=2, num_timesteps=1000)

for patch in (2, 4, 8):
    MODELS.preset(f"dit-s/{patch}", "dit", depth=12, width=384, heads=6, patch=patch)
    MODELS.preset(f"dit-b/{patch}", "dit", depth=12, width=768, heads=12, patch=patch)
    MODELS.preset(f"dit-l/{patch}", "dit", depth=24, width=1024, heads=16, patch=patch)
    MODELS.preset(f"dit-xl/{patch}", "dit", depth=28, width=1152, heads=16, patch=patch)
MODELS.preset("dit-tiny", "dit", depth=4, width=128, heads=4, patch=2)

for form, stem in (("shared", "mmdit"), ("dual", "mmdit-dual")):
    MODELS.preset(f"{stem}-s/2", "mmdit", form=form, depth=12, width=384, heads=6, patch=2)
    MODELS.preset(f"{stem}-b/2", "mmdit", form=form, depth=12, width=768, heads=12, patch=2)
    MODELS.preset(f"{stem}-l/2", "mmdit", form=form, depth=24, width=1024, heads=16, patch=2)
    # The paper's 16 heads of 72; `heads: 18` gives heads of 64, which no attention kernel pads.
    MODELS.preset(f"{stem}-xl/2", "mmdit", form=form, depth=28, width=1152, heads=16, patch=2)
    MODELS.preset(f"{stem}-tiny", "mmdit", form=form, depth=4, width=128, heads=4, patch=2)
