"""Weighted squared error between a prediction and its diffusion target, with the noise drawn again instead of stored.

    target_b = x0_coef_b x0_b + eps_coef_b eps_b
    mse_b    = mean over the sample of (pred_b - target_b)^2        loss_b = weight_b mse_b
    dpred_b  = dloss_b weight_b 2 / n (pred_b - target_b)                        [Hang et al. 2023, Eq. 4-5, App. B]

Every diffusion target is linear in x0 and eps: x0 (1, 0), eps (0, 1), v (-sigma, alpha), flow (-1, 1). pred and x0 are [B, ...] of
fp32, bf16 or fp16; the rest [B] fp32. Computed in fp32. Bytes per element in bf16: forward 4 read; backward 4 read, 2 written. The
backward pass keeps its inputs only. A sample's sum is made in two passes of fixed order (blocks, then the blocks' sums), without atomics.
"""

import torch
from torch import Tensor

from fasttrain_kernels.arguments import draw_key, require_constant, require_float, require_per_sample, require_same_device
from fasttrain_kernels.dispatch import choose
from fasttrain_kernels.language import jit, tl, triton
from fasttrain_kernels.philox import Purpose, normal, normals

_BLOCK = 1024


def weighted_mse_reference(
    pred: Tensor, x0: Tensor, x0_coef: Tensor, eps_coef: Tensor, weight: Tensor, seed: Tensor | int, position: Tensor
) -> tuple[Tensor, Tensor]:
    """(weight * mse, mse) of each sample in plain torch, computed in fp32 (float64 for a float64 pred)."""
    wide = torch.promote_types(pred.dtype, torch.float32)
    per_sample = (-1,) + (1,) * (pred.dim() - 1)
    eps = normal(seed, position, x0.shape[1:]).to(wide)
    target = x0_coef.to(wide).view(per_sample) * x0.to(wide) + eps_coef.to(wide).view(per_sample) * eps
    mse = (pred.to(wide) - target).square().flatten(1).mean(1)
    return weight.to(wide) * mse, mse.detach()


@jit
def _difference(
    pred,  # [B, size] any float
    x0,  # [B, size] any float
    x0_coef,  # [B] fp32
    eps_coef,  # [B] fp32
    seed,  # [] int64
    position,  # [B] int64
    sample,
    start,
    size,
    PURPOSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """[BLOCK] fp32: pred - target from element `start` of the sample on, 0 past its end."""
    element = start + tl.arange(0, BLOCK)
    inside = element < size
    clean = tl.load(x0 + sample * size + element, mask=inside, other=0.0).to(tl.float32)
    target = tl.load(x0_coef + sample) * clean
    noise_part = tl.load(eps_coef + sample)
    if noise_part != 0:
        target += noise_part * normals(tl.load(seed), tl.load(position + sample), start, PURPOSE, BLOCK)
    guess = tl.load(pred + sample * size + element, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, guess - target, 0.0)


@jit
def _block_sums_kernel(
    pred,  # [B, size] any float
    x0,  # [B, size] any float
    x0_coef,  # [B] fp32
    eps_coef,  # [B] fp32
    seed,  # [] int64
    position,  # [B] int64
    sums,  # [B, blocks] fp32
    size,
    PURPOSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    difference = _difference(pred, x0, x0_coef, eps_coef, seed, position, sample, block * BLOCK, size, PURPOSE, BLOCK)
    tl.store(sums + sample * tl.num_programs(1) + block, tl.sum(difference * difference, axis=0))


@jit
def _finish_kernel(
    sums,  # [B, blocks] fp32
    weight,  # [B] fp32
    loss,  # [B] fp32
    mse,  # [B] fp32
    blocks,
    size,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        total += tl.load(sums + sample * blocks + block, mask=block < blocks, other=0.0)
    mean = tl.sum(total, axis=0) / size
    tl.store(mse + sample, mean)
    tl.store(loss + sample, mean * tl.load(weight + sample))


@jit
def _gradient_kernel(
    dloss,  # [B] fp32
    pred,  # [B, size] any float
    x0,  # [B, size] any float
    x0_coef,  # [B] fp32
    eps_coef,  # [B] fp32
    weight,  # [B] fp32
    seed,  # [] int64
    position,  # [B] int64
    dpred,  # [B, size] pred's type
    size,
    PURPOSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    difference = _difference(pred, x0, x0_coef, eps_coef, seed, position, sample, start, size, PURPOSE, BLOCK)
    factor = tl.load(dloss + sample) * tl.load(weight + sample) * (2.0 / size)
    element = start + tl.arange(0, BLOCK)
    tl.store(dpred + sample * size + element, factor * difference, mask=element < size)


@torch.library.custom_op("fasttrain::weighted_mse", mutates_args=())
def _weighted_mse_op(
    pred: Tensor, x0: Tensor, x0_coef: Tensor, eps_coef: Tensor, weight: Tensor, seed: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    pred, x0 = pred.contiguous(), x0.contiguous()
    loss, mse = torch.empty_like(weight), torch.empty_like(weight)
    if pred.numel() > 0:
        batch, size = pred.shape[0], pred[0].numel()
        blocks = triton.cdiv(size, _BLOCK)
        sums = torch.empty((batch, blocks), dtype=torch.float32, device=pred.device)
        draw = (x0_coef, eps_coef, seed, position)
        with torch.cuda.device_of(pred):
            _block_sums_kernel[batch, blocks](pred, x0, *draw, sums, size, int(Purpose.NOISE), _BLOCK, num_warps=4)
            _finish_kernel[batch,](sums, weight, loss, mse, blocks, size, min(_BLOCK, triton.next_power_of_2(blocks)), num_warps=1)
    return loss, mse


@_weighted_mse_op.register_fake
def _(pred: Tensor, x0: Tensor, x0_coef: Tensor, eps_coef: Tensor, weight: Tensor, seed: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(weight)


@torch.library.custom_op("fasttrain::weighted_mse_backward", mutates_args=())
def _weighted_mse_backward_op(
    dloss: Tensor, pred: Tensor, x0: Tensor, x0_coef: Tensor, eps_coef: Tensor, weight: Tensor, seed: Tensor, position: Tensor
) -> Tensor:
    pred, x0, dloss = pred.contiguous(), x0.contiguous(), dloss.contiguous()
    dpred = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
    if pred.numel() > 0:
        size = pred[0].numel()
        grid = (pred.shape[0], triton.cdiv(size, _BLOCK))
        inputs = (dloss, pred, x0, x0_coef, eps_coef, weight, seed, position)
        with torch.cuda.device_of(pred):
            _gradient_kernel[grid](*inputs, dpred, size, int(Purpose.NOISE), _BLOCK, num_warps=4)
    return dpred


@_weighted_mse_backward_op.register_fake
def _(dloss: Tensor, pred: Tensor, x0: Tensor, x0_coef: Tensor, eps_coef: Tensor, weight: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    return torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dloss: Tensor, _dmse: Tensor) -> tuple[Tensor | None, ...]:
    return _weighted_mse_backward_op(dloss, *ctx.saved_tensors), *[None] * 6


_weighted_mse_op.register_autograd(_backward, setup_context=_save)


def weighted_mse(
    pred: Tensor,
    x0: Tensor,
    x0_coef: Tensor,
    eps_coef: Tensor,
    weight: Tensor,
    seed: Tensor | int,
    position: Tensor,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Weighted squared error of each sample between a prediction and its diffusion target.

    loss_b = weight_b mean (pred_b - x0_coef_b x0_b - eps_coef_b eps_b)^2        [Hang et al. 2023, Eq. 4-5, App. B]

    Args:
        pred: model output, [B, ...], fp32, bf16 or fp16.
        x0: clean latents or pixels, pred's shape, any of these types.
        x0_coef, eps_coef: [B] fp32, the target's parts; the noise is drawn again from (seed, position), and not at all where
            eps_coef is 0 (the reference draws it and multiplies by 0).
        weight: [B] fp32, dimensionless, already converted for the target.
        seed: [] int64 tensor on pred's device (an int costs a copy to the device).
        position: [B] int64, as given to `noising`.
        impl: "auto", "triton" or "reference".

    Returns:
        (loss [B], mse [B]), both fp32 and accumulated in fp32; loss is differentiable in pred, mse is unweighted and not
        differentiable.

    Raises:
        ValueError: shapes, types or devices disagree, samples are empty, or `impl` cannot run here.
    """
    require_float(pred=pred, x0=x0, x0_coef=x0_coef, eps_coef=eps_coef, weight=weight)
    if pred.shape != x0.shape or pred.dim() < 2 or pred.shape[1:].numel() == 0:
        raise ValueError(f"pred and x0 must both be [B, ...] with elements in each sample, got {list(pred.shape)} and {list(x0.shape)}")
    values = {"x0_coef": x0_coef, "eps_coef": eps_coef, "weight": weight}
    require_per_sample(pred.shape[0], **values)
    require_same_device(pred.device, x0=x0, **values)
    require_constant("pred", x0=x0, **values)
    seed = draw_key(seed, position, pred.shape[0], pred.device)
    if choose(impl, pred, x0) == "reference":
        return weighted_mse_reference(pred, x0, x0_coef, eps_coef, weight, seed, position)
    x0_coef, eps_coef, weight = (v.to(torch.float32).contiguous() for v in values.values())
    loss, mse = _weighted_mse_op(pred, x0, x0_coef, eps_coef, weight, seed, position.contiguous())
    return loss, mse.detach()
