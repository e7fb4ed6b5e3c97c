"""What a model is before it is built: a frozen config with its counts, and the registry of them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from fasttrain.errors import UserError
from fasttrain.models.implementations import AUTOMATIC, Implementations
from fasttrain.models.network import Network
from fasttrain.registry import Registry, shown

MODELS = Registry("model")
LARGEST, DEEPEST, MOST_ROWS = 1 << 16, 256, 10_000_000  # beyond any model: what lies above is a slip of the pen


@dataclass(frozen=True, kw_only=True)
class Transformer(ABC):
    """The fields every diffusion transformer has; a model's own config adds to them.

    `input_size`, `channels` and `num_classes` may be None, which means: as the data says. They are filled in with
    `dataclasses.replace` before anything is built or counted.

    Args:
        input_size: height and width of the latents (or pixels) the network sees.
        channels: channels of the latents.
        num_classes: K; 0 builds an unconditional model, None takes K from the data.
        patch: side of a patch, in latents.
        depth: number of blocks.
        width: D, of a token.
        heads: number of attention heads; divides the width.
        qk_norm: normalise the queries and keys of each head (RMSNorm with weights); keeps large models' attention from saturating.
        rotary: turn the queries and keys by their patch's row and column, half of each head's pairs for either; needs qk_norm.
        checkpoint_blocks: keep only each block's input for the backward pass and run the block again there.

    Raises:
        ValueError: sizes that are not positive or do not divide each other, or rotary without qk_norm; the message names the keys.
    """

    input_size: int | None = None
    channels: int | None = None
    num_classes: int | None = None
    patch: int = 2
    depth: int = 12
    width: int = 768
    heads: int = 12
    qk_norm: bool = False
    rotary: bool = False
    checkpoint_blocks: bool = False

    def __post_init__(self) -> None:
        for key in ("input_size", "channels", "patch", "depth", "width", "heads"):
            value = getattr(self, key)
            most = DEEPEST if key == "depth" else LARGEST
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"model.{key} must be at least 1{f' and at most {most}' if value > most else ''}, not {shown(value)}")
        if self.num_classes is not None and not 0 <= self.num_classes <= MOST_ROWS:
            raise ValueError(f"model.num_classes must be 0 (unconditional) or more, at most {MOST_ROWS}, not {shown(self.num_classes)}")
        if self.width % self.heads:
            raise ValueError(f"model.width {self.width} is not divisible by model.heads {self.heads}")
        if self.input_size is not None and self.input_size % self.patch:
            raise ValueError(f"model.input_size {self.input_size} is not divisible by model.patch {self.patch}")
        if self.rotary and not self.qk_norm:
            raise ValueError("model.rotary turns normalised queries and keys: set model.qk_norm too, or leave model.rotary out")
        if self.rotary and self.head_width % 4:
            raise ValueError(f"model.rotary needs heads of a width divisible by 4, not model.width / model.heads = {self.head_width}")

    def geometry(self) -> tuple[int, int, int]:
        """(channels, input_size, num_classes), all known.

        Raises:
            UserError: one of them was to come from the data and has not.
        """
        if self.channels is None or self.input_size is None or self.num_classes is None:
            unknown = [key for key in ("channels", "input_size", "num_classes") if getattr(self, key) is None]
            raise UserError(f"model.{', model.'.join(unknown)}: not set and not yet taken from the data; give a value")
        return self.channels, self.input_size, self.num_classes

    @property
    def null_label(self) -> int | None:
        """The label that stands for "no class": K, one row past the last class; None for an unconditional model."""
        num_classes = self.geometry()[2]
        return num_classes or None

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.geometry()[1] // self.patch

    @property
    def head_width(self) -> int:
        """d, the width of one attention head."""
        return self.width // self.heads

    @property
    def extra_tokens(self) -> int:
        """Tokens that are not patches and come before them."""
        return 0

    @property
    def ragged_tokens(self) -> int:
        """How many of the extra tokens may be padding, which attention passes over."""
        return 0

    @property
    def tokens(self) -> int:
        """T, what attention and the MLP work on for one image."""
        return self.grid**2 + self.extra_tokens

    @abstractmethod
    def build(self, how: Implementations = AUTOMATIC) -> Network:
        """The network, initialised from torch's global generator, as `model(x [B,C,H,W], t [B], cond: Cond) -> [B,C,H,W]`.

        `how` never changes its parameters, their names or the random numbers they are made of.
        """

    @abstractmethod
    def flops_per_image(self) -> int:
        """Floating-point operations of one image's forward pass, a multiply-add counted as 2."""
