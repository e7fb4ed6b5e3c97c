"""The arms of the kernel benchmark: one operation as eager PyTorch, compiled, ours, and other libraries' where they are installed.

An arm is a callable with the operation's own arguments. Before an arm is timed, all its outputs and gradients are compared with the
reference in float64: an arm that is off by more than the error budget has no speed.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fasttrain_kernels.cases import Case, Inputs
from torch import Tensor

from tests.kernels.calls import budget, errors, in_float64, outputs_of

Call = Callable[..., Any]


@dataclass(frozen=True)
class Arm:
    """One way to compute an operation."""

    name: str
    call: Call
    means: str


class Region:
    """One arm on one set of inputs, ready to run: forward, and backward from given gradients of its outputs."""

    def __init__(self, call: Call, inputs: Inputs, case: Case, options: dict[str, Any]):
        self._call = call
        self._leaves = {name: inputs[name].detach().requires_grad_() for name in case.differentiable}
        self._inputs = {**inputs, **self._leaves, **options}
        self._upstream: list[Tensor] = []

    def forward(self) -> list[Tensor]:
        """The outputs, recorded for the backward pass."""
        return outputs_of(self._call, self._inputs)

    def backward(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The gradient of every differentiable input, for gradients of the outputs that are the same for every arm."""
        roots = [output for output in outputs if output.requires_grad]
        if not self._upstream:
            self._upstream = [_random_like(root, seed) for seed, root in enumerate(roots)]
        return torch.autograd.grad(roots, list(self._leaves.values()), [g.to(r.dtype) for g, r in zip(self._upstream, roots, strict=True)])

    def both(self) -> tuple[Tensor, ...]:
        """Forward, then backward where there is one; all tensors."""
        outputs = self.forward()
        gradients = self.backward(outputs) if self._leaves else ()
        return tuple(t.detach() for t in (*outputs, *gradients))


def _random_like(root: Tensor, seed: int) -> Tensor:
    """Standard normal numbers rounded to bf16, so that every dtype sees the same ones."""
    generator = torch.Generator(root.device).manual_seed(1000 + seed)
    return torch.randn(root.shape, generator=generator, device=root.device).bfloat16()


def fault(arm: Arm, plain: Arm, case: Case, inputs: Inputs, options: dict[str, Any]) -> str | None:
    """What is wrong with an arm's outputs and gradients, or None: off by more than twice plain PyTorch's error, or not finite."""
    truth = Region(case.reference, in_float64(inputs), case, options).both()
    theirs = Region(plain.call, inputs, case, options).both()
    ours = Region(arm.call, inputs, case, options).both()
    if len(ours) != len(truth):
        return f"gives {len(ours)} outputs and gradients, not {len(truth)}"
    for number, (value, reference, exact) in enumerate(zip(ours, theirs, truth, strict=True)):
        if exact.numel() == 0 or not exact.is_floating_point():
            continue
        allowed, found = budget(reference, exact, drawn="seed" in inputs), errors(value, exact)
        if not torch.isfinite(value).all() or any(f > a for f, a in zip(found, allowed, strict=True)):
            off = f"{found.largest:.3g} (mean {found.mean:.3g}), allowed {allowed.largest:.3g} ({allowed.mean:.3g})"
            return f"tensor {number} of outputs and gradients is off by {off}"
    return None


def arms(operation: str, case: Case, options: dict[str, Any], backend: str, device: torch.device) -> Iterator[Arm]:
    """Every arm of an operation that this machine can run, the eager reference first."""
    yield Arm("eager", case.reference, "the reference in plain PyTorch, operation by operation")
    compiled = torch.compile(case.reference, fullgraph=True, dynamic=False, backend=backend)
    yield Arm("compile", compiled, f"torch.compile of the same reference, backend {backend}")
    yield Arm("ours", case.call, "fasttrain_kernels, impl=auto")
    if device.type == "cuda":
        yield from _installed(operation, options)


def absent(operation: str) -> list[str]:
    """Libraries that have this operation and are not installed."""
    return sorted({library.name for library in LIBRARIES.get(operation, ()) if not library.present()})


@dataclass(frozen=True)
class Library:
    """Another library's version of an operation, imported only where it is installed."""

    name: str
    module: str
    adapt: Callable[[Any], Call]
    norms: tuple[str, ...]

    def present(self) -> bool:
        try:
            return importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:
            return False


def _installed(operation: str, options: dict[str, Any]) -> Iterator[Arm]:
    for library in LIBRARIES.get(operation, ()):
        if library.present() and options.get("norm", library.norms[0]) in library.norms:
            yield Arm(library.name, library.adapt(importlib.import_module(library.module)), f"{library.module}")


def _affine(normalise: Callable[..., Tensor]) -> Call:
    """residual_norm from a library's norm alone: the addition stays PyTorch's."""

    def call(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, *, norm: str = "layer", eps: float = 1e-6) -> Any:
        total = x + branch
        return total, normalise(total, weight, bias, norm, eps)

    return call


def _modulated(normalise: Callable[..., Tensor]) -> Call:
    """adaln from a library's affine norm with weight one: the modulation stays PyTorch's."""

    def call(x: Tensor, scale: Tensor, shift: Tensor, *, norm: str = "layer", eps: float = 1e-6) -> Tensor:
        one, zero = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device), torch.zeros(x.shape[-1], dtype=x.dtype, device=x.device)
        return torch.addcmul(shift[:, None], normalise(x, one, zero, norm, eps), 1 + scale[:, None])

    return call


def _liger(module: Any) -> Callable[..., Tensor]:
    def normalise(x: Tensor, weight: Tensor, bias: Tensor, norm: str, eps: float) -> Tensor:
        if norm == "layer":
            return module.liger_layer_norm(x, weight, bias, eps)
        return module.liger_rms_norm(x, weight, eps, in_place=False)

    return normalise


def _liger_fused(module: Any) -> Call:
    def call(x: Tensor, branch: Tensor, weight: Tensor, bias: None, *, norm: str = "rms", eps: float = 1e-6) -> Any:
        y, total = module.liger_fused_add_rms_norm(branch, x, weight, eps, in_place=False)
        return total, y

    return call


def _quack_fused(module: Any) -> Call:
    def call(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, *, norm: str = "rms", eps: float = 1e-6) -> Any:
        y, total = module.rmsnorm(branch, weight, bias=bias, residual=x, eps=eps, prenorm=True)
        return total, y

    return call


def _apex(module: Any) -> Callable[..., Tensor]:
    def normalise(x: Tensor, weight: Tensor, bias: Tensor, norm: str, eps: float) -> Tensor:
        if norm == "layer":
            return module.fused_layer_norm_affine(x, weight, bias, x.shape[-1:], eps)
        return module.fused_rms_norm_affine(x, weight, x.shape[-1:], eps)

    return normalise


def _quack(module: Any) -> Callable[..., Tensor]:
    return lambda x, weight, bias, norm, eps: module.rmsnorm(x, weight, eps=eps)


_LIGER, _QUACK, _APEX = "liger_kernel.transformers.functional", "quack", "apex.normalization.fused_layer_norm"
_BOTH = ("layer", "rms")
LIBRARIES: dict[str, tuple[Library, ...]] = {
    "adaln": (
        Library("liger", _LIGER, lambda module: _modulated(_liger(module)), _BOTH),
        Library("quack", _QUACK, lambda module: _modulated(_quack(module)), ("rms",)),
        Library("apex", _APEX, lambda module: _modulated(_apex(module)), _BOTH),
    ),
    "residual_norm": (
        Library("liger", _LIGER, lambda module: _affine(_liger(module)), ("layer",)),
        Library("liger", _LIGER, _liger_fused, ("rms",)),
        Library("quack", _QUACK, _quack_fused, ("rms",)),
        Library("apex", _APEX, lambda module: _affine(_apex(module)), _BOTH),
    ),
}
"""What other libraries have of our operations. None of them was at hand where this was written: the gate above judges them."""
