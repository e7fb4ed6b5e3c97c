"""CUDA graphs of a piece of work: warmed up, captured, and given to the caller to replay."""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")
WARM_UP = 3


def captured(run: Callable[[], T], device: torch.device) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of `run()`, and what it returned: a replay writes there anew.

    `run` happens a few times before, on another stream than the default one, so that everything is compiled and allocated and no gradient
    is bound to the default stream, which a capture cannot wait for.

    Raises:
        RuntimeError: something in `run` cannot be captured; its own error is the context.
    """
    # A capture that fails leaves its stream the current one: whatever happens, the caller gets his own back.
    with torch.cuda.stream(torch.cuda.current_stream(device)):
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run()
    return graph, result
