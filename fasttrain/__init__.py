"""fasttrain trains diffusion transformers to a given image quality in the least GPU time."""
