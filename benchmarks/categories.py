"""Where a step's time goes: device time by kind of work, from a profile; and how often the host waits for the device."""

import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

CATEGORIES: tuple[tuple[str, str], ...] = (
    ("norm", r"^triton_(poi|red|per).*norm"),
    ("GELU", r"^triton_(poi|red|per).*gelu"),
    # Before those below: a fusion is also named after the matrix product or the attention whose bias or layout it takes over.
    ("Inductor's fusions", r"^triton_(poi|red|per)"),
    ("optimizer", r"adamw|adam_|fusedadam|multi_tensor|foreach|_ema"),
    ("attention", r"attention|flash|fmha|_sdpa|cudnn_generated"),
    (
        "GEMM",
        r"^triton_tem|gemm|cutlass|cublas|nvjet|xmma|mma_|addmm|aten::mm|aten::bmm|aten::linear|splitk|convolution|conv2d|wgrad|dgrad",
    ),
    ("norm", r"norm|adaln|rms|_sum_rows"),
    ("GELU", r"gelu"),
    ("noise and loss", r"noising|philox|uniform|weighted_mse|_block_sums|_finish|_gradient_kernel|distribution|mse"),
    ("copies", r"memcpy|memset|copy|aten::to|aten::cat|catarray|fill"),
    ("elementwise", r"elementwise|vectorized|reduce|aten::|index|embedding|softmax|scatter|gather"),
)
"""In this order: the first pattern that fits a kernel's name, in small letters, decides."""
OTHER = "other"


class Span(NamedTuple):
    """A kernel on the device: its name, begin and end in microseconds."""

    name: str
    begin: float
    end: float


def category(name: str) -> str:
    """The kind of work behind a kernel's or operator's name."""
    return next((kind for kind, pattern in CATEGORIES if re.search(pattern, name.lower())), OTHER)


def by_category(spans: Iterable[Span], steps: int) -> dict[str, Any]:
    """Microseconds a step of each category, of nothing at all ("idle"), and of the longest kernels by name."""
    total: defaultdict[str, float] = defaultdict(float)
    names: defaultdict[str, float] = defaultdict(float)
    ordered = sorted(spans, key=lambda span: span.begin)
    idle, reached = 0.0, ordered[0].begin if ordered else 0.0
    for span in ordered:
        total[category(span.name)] += span.end - span.begin
        names[span.name[:120]] += span.end - span.begin
        idle += max(0.0, span.begin - reached)
        reached = max(reached, span.end)
    longest = sorted(names.items(), key=lambda entry: -entry[1])[:25]
    return {
        "microseconds": {kind: round(time / steps, 2) for kind, time in sorted(total.items(), key=lambda entry: -entry[1])},
        "idle": round(idle / steps, 2),
        "kernels": round(len(ordered) / steps, 1),
        "longest": {name: round(time / steps, 2) for name, time in longest},
    }


def profiled(step: Callable[[], Any], device: torch.device, steps: int = 3) -> dict[str, Any]:
    """`by_category` of a few steps: kernels on a GPU; on a CPU operators without what they call, one after another."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as found:
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return by_category(device_spans(found.events() or []) if device.type == "cuda" else _operator_spans(found), steps)


def device_spans(events: Iterable[Any]) -> list[Span]:
    """What ran on the device. Compiled regions are marked on its timeline too, over the very kernels that they hold: they are left out."""
    ran = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation]
    return [Span(event.name, event.time_range.start, event.time_range.end) for event in ran]


def _operator_spans(found: profile) -> list[Span]:
    spans, begin = [], 0.0
    for event in found.events() or []:
        spans.append(Span(event.name, begin, begin + event.self_cpu_time_total))
        begin += event.self_cpu_time_total
    return spans


def host_waits(step: Callable[[], Any], device: torch.device, steps: int = 3) -> dict[str, Any]:
    """How often a step makes the host wait for the device, as torch notices it, and where; None on a CPU."""
    if device.type != "cuda":
        return {"per_step": None, "where": {}}
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(steps):
                step()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    places: defaultdict[str, int] = defaultdict(int)
    for warning in told:
        if "synchroniz" in str(warning.message):
            places[f"{warning.filename}:{warning.lineno}"] += 1
    return {"per_step": sum(places.values()) / steps, "where": dict(places)}
