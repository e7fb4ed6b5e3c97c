"""AdamW and exponential moving averages of the weights, in one pass over memory.

    g' = clip g;  m = m + (1 - b1)(g' - m);  v = b2 v + (1 - b2) g'^2                       [Loshchilov and Hutter 2019, algorithm 2]
    p = (1 - lr wd) p - lr m_hat / (sqrt(v_hat) + eps);  m_hat = m / (1 - P1), v_hat = v / (1 - b2^update)
    ema = decay ema + (1 - decay) p, for each average;  weight = p, rounded                    [Polyak and Juditsky 1992]

P1 is the product of the b1 of all updates so far: b1^update, unless b1 changes from update to update.

p, m, v and every ema are fp32, g is of any float type, the optional weights are what a network computes with. Bytes per parameter with a
bf16 gradient and bf16 weights: 2 read of g, 4 read and 4 written of p, m, v and each ema, 2 written of the weight: 28, and 36 with one
average. Nothing is saved: there is no gradient.

One tensor (a flat partition of ZeRO's) is one launch. So is a list of tensors: its kernel finds them through a table of addresses, 8 bytes
for each tensor of each kind and 16 for each 32768 elements, which the host builds at every call, since gradients move, and sends once.

The learning rate, the corrections and the decays are numbers of the launch: they do not specialise the kernel, but a CUDA graph replays
those that it was captured with. So capture a training step without its update, as one must with torch's AdamW unless `capturable`.
While a graph is captured a list takes one launch a tensor, because no table that the host wrote could outlive the capture.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fasttrain_kernels.adamw_ema_kernels import GRADIENT, MOST_AVERAGES, Row, update_list, update_one
from fasttrain_kernels.arguments import require_float, require_same_device
from fasttrain_kernels.dispatch import choose
from fasttrain_kernels.registration import operation


def adamw_ema_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Sequence[Tensor]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    update: int,
    decays: Sequence[float],
    product1: float | None = None,
    weights: Sequence[Tensor] | None = None,
    clip: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """The update in plain torch, in place, computed in the masters' type; no host sync."""
    correction1, correction2 = corrections(betas, update, product1)
    for i, (p, grad, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        averages = [average[i] for average in emas]
        changed = [p, m, v, *averages, *([weights[i]] if weights is not None else [])]
        before = [t.clone() for t in changed] if found_inf is not None else []
        grad = grad.to(p.dtype) if clip is None else grad.to(p.dtype) * clip
        m.lerp_(grad, 1 - betas[0])
        v.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
        denominator = v.sqrt().div_(math.sqrt(correction2)).add_(eps)
        p.mul_(1 - lr * weight_decay).addcdiv_(m, denominator, value=-lr / correction1)
        for average, decay in zip(averages, decays, strict=True):
            average.lerp_(p, 1 - decay)
        if weights is not None:
            weights[i].copy_(p)
        if found_inf is not None:
            for t, old in zip(changed, before, strict=True):
                t.copy_(torch.where(found_inf != 0, old, t))


@operation("adamw_ema", fake=lambda *_: None, mutates=("params", "exp_avgs", "exp_avg_sqs", "emas", "weights"))
def _adamw_ema_op(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    emas: list[Tensor],
    weights: list[Tensor],
    clip: Tensor | None,
    found_inf: Tensor | None,
    numbers: list[float],
    shares: list[float],
) -> None:
    count, places = len(params), range(len(params))
    averages = [emas[i * count : (i + 1) * count] for i in range(len(shares))]
    given: list[Row] = [
        [params[i], grads[i], exp_avgs[i], exp_avg_sqs[i], weights[i] if weights else None, *(ema[i] for ema in averages)] for i in places
    ]
    rows = [[None if t is None else t.contiguous() for t in row] for row in given]
    capturing = params[0].device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if capturing and len(averages) > MOST_AVERAGES:
        raise ValueError(f"a CUDA graph takes an update with at most {MOST_AVERAGES} averages, got {len(averages)}: update outside it")
    with torch.cuda.device_of(params[0]):
        if len(averages) > MOST_AVERAGES or (count > 1 and not capturing):
            update_list(rows, (clip, found_inf), (*numbers, tuple(shares)))
        else:
            for row in rows:
                update_one(row, (clip, found_inf), (*numbers, tuple(shares)))
    for row, updated in zip(given, rows, strict=True):
        for place, (t, new) in enumerate(zip(row, updated, strict=True)):
            if t is not new and place != GRADIENT:
                t.copy_(new)
    # By its version autograd knows that a tensor was written to: a backward pass that needs the old weights is refused, not misled.
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *emas, *weights])


def corrections(betas: tuple[float, float], update: int, product1: float | None = None) -> tuple[float, float]:
    """What m and v are divided by for m_hat and v_hat: 1 - P1 and 1 - b2^update."""
    return 1 - (betas[0] ** update if product1 is None else product1), 1 - betas[1] ** update


def _numbers(lr: float, betas: tuple[float, float], eps: float, weight_decay: float, update: int, product1: float | None) -> list[float]:
    """What the kernels compute with, rounded to fp32 only there: 1 - b1, b2, 1 - b2, sqrt(1 - b2^update), eps, 1 - lr wd, the rate of p."""
    correction1, correction2 = corrections(betas, update, product1)
    return [1 - betas[0], betas[1], 1 - betas[1], math.sqrt(correction2), eps, 1 - lr * weight_decay, lr / correction1]


def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Sequence[Tensor]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    update: int,
    decays: Sequence[float],
    product1: float | None = None,
    weights: Sequence[Tensor] | None = None,
    clip: Tensor | None = None,
    found_inf: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """One update of masters, moments and averages, in place.

    p = (1 - lr wd) p - lr m_hat / (sqrt(v_hat) + eps);  ema = decay ema + (1 - decay) p    [Loshchilov and Hutter 2019, algorithm 2]

    Args:
        params: master weights, any number of tensors of any shapes, fp32, all on one device.
        grads: of the same shapes, fp32, bf16 or fp16, all of one type.
        exp_avgs, exp_avg_sqs: the moments, as params.
        emas: for each average, a list as params.
        lr, betas, eps, weight_decay: AdamW's.
        update: of this update, 1 for the first.
        decays: of each average, the factor of its old value in this update.
        product1: P1, the product of every update's b1 up to and with this one, in [0, 1); or None where all had this b1.
        weights: written with the new masters, rounded: a list as params, fp32, bf16 or fp16, all of one type; or None.
        clip: [] fp32 on the device, a factor of the gradient; or None.
        found_inf: [] fp32 on the device: where it is not 0, nothing is changed; or None.
        impl: "auto", "triton" or "reference".

    Raises:
        ValueError: lists, shapes, types or devices disagree, update is not positive, product1 is none, or `impl` cannot run here.
    """
    columns = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, **{f"emas[{i}]": ema for i, ema in enumerate(emas)}}
    _check(params, columns if weights is None else {**columns, "weights": weights})
    if len(decays) != len(emas):
        raise ValueError(f"decays must hold one number for each of the {len(emas)} averages, got {len(decays)}")
    if update < 1:
        raise ValueError(f"update must be 1 or more, got {update}")
    if product1 is not None and not 0 <= product1 < 1:
        raise ValueError(f"product1 is a product of numbers in [0, 1) and must lie there, got {product1}")
    if not params:
        return
    scalars = {name: t for name, t in (("clip", clip), ("found_inf", found_inf)) if t is not None}
    for name, scalar in scalars.items():
        if scalar.numel() != 1 or scalar.dtype != torch.float32:
            raise ValueError(f"{name} must be one fp32 number on the device, got {list(scalar.shape)} {scalar.dtype}")
    require_same_device(params[0].device, **scalars)
    settings: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "update": update, "product1": product1}
    if choose(impl, params[0], grads[0]) == "reference":
        settings |= {"decays": decays, "weights": weights, "clip": clip, "found_inf": found_inf}
        adamw_ema_reference(params, grads, exp_avgs, exp_avg_sqs, emas, **settings)
        return
    averages = [t for ema in emas for t in ema]
    lists = [list(each) for each in (params, grads, exp_avgs, exp_avg_sqs, averages, weights or [])]
    _adamw_ema_op(*lists, clip, found_inf, _numbers(**settings), [1 - decay for decay in decays])


def _check(params: Sequence[Tensor], columns: dict[str, Sequence[Tensor]]) -> None:
    """Every list as long as params, of the same shapes and device; states of the masters' type, gradients and weights of one type each."""
    for name, tensors in {"params": params, **columns}.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} must hold {len(params)} tensors, one for each of params, got {len(tensors)}")
        free = name in ("grads", "weights")
        for i, (t, p) in enumerate(zip(tensors, params, strict=True)):
            if t.shape != p.shape:
                raise ValueError(f"{name}[{i}] must have the shape of params[{i}], {list(p.shape)}, got {list(t.shape)}")
            if t.device != params[0].device:
                raise ValueError(f"{name}[{i}] is on {t.device}, params[0] on {params[0].device}")
            wanted = tensors[0].dtype if free else torch.promote_types(params[0].dtype, torch.float32)
            if t.dtype != wanted:
                raise ValueError(f"{name}[{i}] must be {wanted}, as all of {name} must, got {t.dtype}: call once for each type")
        if free and tensors:
            require_float(**{name: tensors[0]})
