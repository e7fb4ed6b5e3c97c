"""What computes a network: chosen when it is built, and never a part of what it is or of its state."""

from dataclasses import dataclass, field

from fasttrain_kernels.dispatch import Kernels


@dataclass(frozen=True)
class Implementations:
    """The choices that change a network's speed and its rounding, and nothing else.

    Args:
        kernels: the implementation of each fused operation.
        attention: one of `attention.ATTENTION`; "auto" leaves it to torch (a run measures first and then names one).
        deterministic: ask the flash-attn packages for gradients that are the same bits each time; torch has its own switch for the rest.
        packed: attend among captions of different lengths by the bounds of sequences (True) or by a mask; None: as the attention can.
    """

    kernels: Kernels = field(default_factory=Kernels)
    attention: str = "auto"
    deterministic: bool = False
    packed: bool | None = None


AUTOMATIC = Implementations()
"""Everything left to the machine at hand."""
