"""What every network here is: a row of equal blocks, each compiled, recomputed and gathered as one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Network(nn.Module):
    """A network whose work is in `blocks`, all of one class.

    A block takes the tokens and what the block before it left to be added to them, and leaves the same to the next, so that residual and
    norm are one pass over memory also where blocks meet. With `checkpoint_blocks` a block adds its own: one tensor a block is kept then,
    not two. The tokens are arguments and results of their own, not within tuples: ZeRO-3 hooks a block's backward pass to those.
    """

    blocks: nn.ModuleList

    @property
    def block_type(self) -> type[nn.Module]:
        """The class of every block."""
        return type(self.blocks[0])

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles each block whole; equal blocks share one compilation. Takes torch.compile's arguments.

        It is the block's forward that is compiled, not its call: what others hook to the call (ZeRO-3 gathers weights there) stays outside.
        """
        for block in self.blocks:
            block.forward = torch.compile(block.forward, *args, **{"fullgraph": True, **kwargs})  # type: ignore[method-assign]


def run_block(block: Callable[..., Any], *args: Any, recompute: bool) -> Any:
    """block(*args); with `recompute`, its activations are dropped and computed again in the backward pass."""
    if not (recompute and torch.is_grad_enabled()):
        return block(*args)
    # No block draws random numbers, so the generators' state need not be kept.
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
