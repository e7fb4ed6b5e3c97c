"""Weighted squared error between a prediction and its diffusion target, with the noise drawn again instead of stored.

    target_b = x0_coef_b x0_b + eps_coef_b eps_b
    mse_b    = mean over the sample of (pred_b - target_b)^2        loss_b = weight_b mse_b
    by_range_r = (sum of mse_b, count) over the samples b of timestep range r
    dpred_b  = dloss_b weight_b 2 / n (pred_b - target_b)                        [Hang et al. 2023, Eq. 4-5, App. B]

Every diffusion target is linear in x0 and eps: x0 (1, 0), eps (0, 1), v (-sigma, alpha), flow (-1, 1). pred and x0 are [B, ...] of
fp32, bf16 or fp16; the coefficients [B] fp32. Computed in fp32. Bytes per element in bf16: forward 4 read; backward 4 read, 2 written.
The backward pass keeps its inputs only. All sums are made in two passes of fixed order, without atomics: each block's part of its sample,
then one program over all of them, which also gathers the ranges.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fasttrain_kernels.arguments import draw_key, require_constant, require_float, require_per_sample, require_same_device
from fasttrain_kernels.dispatch import choose
from fasttrain_kernels.language import jit, tl, triton
from fasttrain_kernels.philox import Purpose, normal, normals
from fasttrain_kernels.registration import operation

# 8 elements a thread at 4 warps: one 16-byte access of bf16. A latent of 4 x 32 x 32 gives 4 programs; 32 images fill 128 processors.
# The second pass is one program for a usual number of ranges: 64 samples of 16 blocks are 8 registers a thread. Not timed.
_BLOCK = 1024
_SAMPLES, _BLOCKS, _RANGES = 64, 16, 16


def weighted_mse_reference(
    pred: Tensor,
    x0: Tensor,
    x0_coef: Tensor,
    eps_coef: Tensor,
    weight: Tensor,
    seed: Tensor | int,
    position: Tensor,
    *,
    timestep_range: Tensor,
    ranges: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(weight * mse, mse, mse summed by range) in plain torch, computed in fp32 (float64 for a float64 pred)."""
    wide = torch.promote_types(pred.dtype, torch.float32)
    per_sample = (-1,) + (1,) * (pred.dim() - 1)
    eps = normal(seed, position, x0.shape[1:]).to(wide)
    target = x0_coef.to(wide).view(per_sample) * x0.to(wide) + eps_coef.to(wide).view(per_sample) * eps
    mse = (pred.to(wide) - target).square().flatten(1).mean(1)
    return weight.to(wide) * mse, mse.detach(), _by_range(mse.detach(), timestep_range, ranges)


def _by_range(mse: Tensor, timestep_range: Tensor, ranges: int) -> Tensor:
    """[ranges, 2]: sum and count of the samples in each range. A sum over a mask: `index_add_` has no fixed order on a GPU."""
    hit = timestep_range.clamp(0, ranges - 1)[:, None] == torch.arange(ranges, device=mse.device)  # [B, ranges]
    # `where`, not a product: a NaN must not reach the other ranges.
    return torch.stack([torch.where(hit, mse[:, None], 0).sum(0), hit.sum(0).to(mse.dtype)], dim=1)


@jit
def _difference(
    pred,  # [B, size] any float
    x0,  # [B, size] any float
    x0_coef,  # [B] fp32
    eps_coef,  # [B] fp32
    seed,  # [] int64
    position,  # [B] int64
    sample,  # int64
    start,  # int64
    size,
    PURPOSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """[BLOCK] fp32: pred - target from element `start` of the sample on, 0 past its end."""
    lane = tl.arange(0, BLOCK)
    inside = lane < size - start
    clean = tl.load(x0 + sample * size + start + lane, mask=inside, other=0.0).to(tl.float32)
    target = tl.load(x0_coef + sample) * clean
    noise_part = tl.load(eps_coef + sample)
    if noise_part != 0:
        target += noise_part * normals(tl.load(seed), tl.load(position + sample), start, PURPOSE, BLOCK)
    guess = tl.load(pred + sample * size + start + lane, mask=inside, other=0.0).to(tl.float32)
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
    blocks,
    PURPOSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    difference = _difference(pred, x0, x0_coef, eps_coef, seed, position, sample, start, size, PURPOSE, BLOCK)
    tl.store(sums + tl.program_id(0), tl.sum(difference * difference, axis=0))


@jit
def _finish_kernel(
    sums,  # [B, blocks] fp32
    weight,  # [B] fp32
    timestep_range,  # [B] int64
    loss,  # [B] fp32
    mse,  # [B] fp32
    by_range,  # [ranges, 2] fp32
    batch,
    size,
    blocks,
    ranges,
    SAMPLES: tl.constexpr,
    BLOCKS: tl.constexpr,
    RANGES: tl.constexpr,
):
    mine = tl.program_id(0) * RANGES + tl.arange(0, RANGES)
    total = tl.zeros([RANGES], tl.float32)
    count = tl.zeros([RANGES], tl.float32)
    for first in range(0, batch, SAMPLES):
        sample = first + tl.arange(0, SAMPLES)
        inside = sample < batch
        added = tl.zeros([SAMPLES, BLOCKS], tl.float32)
        for start in range(0, blocks, BLOCKS):
            block = start + tl.arange(0, BLOCKS)
            place = sample.to(tl.int64)[:, None] * blocks + block[None, :]
            added += tl.load(sums + place, mask=inside[:, None] & (block < blocks)[None, :], other=0.0)
        mean = tl.sum(added, axis=1) / size
        if tl.program_id(0) == 0:
            tl.store(mse + sample, mean, mask=inside)
            tl.store(loss + sample, mean * tl.load(weight + sample, mask=inside, other=0.0), mask=inside)
        where = tl.minimum(tl.maximum(tl.load(timestep_range + sample, mask=inside, other=0), 0), ranges - 1).to(tl.int32)
        hit = (where[None, :] == mine[:, None]) & inside[None, :]
        total += tl.sum(tl.where(hit, mean[None, :], 0.0), axis=1)
        count += tl.sum(tl.where(hit, 1.0, 0.0), axis=1)
    tl.store(by_range + mine * 2, total, mask=mine < ranges)
    tl.store(by_range + mine * 2 + 1, count, mask=mine < ranges)


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
    blocks,
    PURPOSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    difference = _difference(pred, x0, x0_coef, eps_coef, seed, position, sample, start, size, PURPOSE, BLOCK)
    factor = tl.load(dloss + sample) * tl.load(weight + sample) * (2.0 / size)
    lane = tl.arange(0, BLOCK)
    tl.store(dpred + sample * size + start + lane, factor * difference, mask=lane < size - start)


def _outputs(weight: Tensor, ranges: int) -> tuple[Tensor, Tensor, Tensor]:
    by_range = torch.empty((ranges, 2), dtype=torch.float32, device=weight.device)
    return torch.empty_like(weight), torch.empty_like(weight), by_range


@operation("weighted_mse", fake=lambda pred, x0, x0_coef, eps_coef, weight, *others: _outputs(weight, others[-1]))
def _weighted_mse_op(
    pred: Tensor,
    x0: Tensor,
    x0_coef: Tensor,
    eps_coef: Tensor,
    weight: Tensor,
    seed: Tensor,
    position: Tensor,
    timestep_range: Tensor,
    ranges: int,
) -> tuple[Tensor, Tensor, Tensor]:
    pred, x0 = pred.contiguous(), x0.contiguous()
    loss, mse, by_range = _outputs(weight, ranges)
    batch, size = pred.shape[0], pred.shape[1:].numel()
    blocks = triton.cdiv(size, _BLOCK)
    sums = torch.empty((batch, blocks), dtype=torch.float32, device=pred.device)
    with torch.cuda.device_of(pred):
        if batch > 0:
            inputs = (pred, x0, x0_coef, eps_coef, seed, position)
            _block_sums_kernel[batch * blocks,](*inputs, sums, size, blocks, int(Purpose.NOISE), _BLOCK, num_warps=4)
        written, tile = (loss, mse, by_range), (_SAMPLES, _BLOCKS, _RANGES)
        grid = (triton.cdiv(ranges, _RANGES),)
        _finish_kernel[grid](sums, weight, timestep_range, *written, batch, size, blocks, ranges, *tile, num_warps=4)
    return loss, mse, by_range


@operation("weighted_mse_backward", fake=lambda dloss, pred, *_: torch.empty(pred.shape, dtype=pred.dtype, device=pred.device))
def _weighted_mse_backward_op(
    dloss: Tensor, pred: Tensor, x0: Tensor, x0_coef: Tensor, eps_coef: Tensor, weight: Tensor, seed: Tensor, position: Tensor
) -> Tensor:
    pred, x0, dloss = pred.contiguous(), x0.contiguous(), dloss.contiguous()
    dpred = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
    if pred.numel() > 0:
        size = pred[0].numel()
        blocks = triton.cdiv(size, _BLOCK)
        inputs = (dloss, pred, x0, x0_coef, eps_coef, weight, seed, position)
        with torch.cuda.device_of(pred):
            _gradient_kernel[pred.shape[0] * blocks,](*inputs, dpred, size, blocks, int(Purpose.NOISE), _BLOCK, num_warps=4)
    return dpred


class _WeightedMse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pred: Tensor,
        x0: Tensor,
        x0_coef: Tensor,
        eps_coef: Tensor,
        weight: Tensor,
        seed: Tensor,
        position: Tensor,
        timestep_range: Tensor,
        ranges: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(pred, x0, x0_coef, eps_coef, weight, seed, position)
        # Undefined gradients stay so: zeros made for the two outputs that have none would be two launches a step.
        ctx.set_materialize_grads(False)
        loss, mse, by_range = _weighted_mse_op(pred, x0, x0_coef, eps_coef, weight, seed, position, timestep_range, ranges)
        ctx.mark_non_differentiable(mse, by_range)
        return loss, mse, by_range

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor | None, _dmse: None, _dby_range: None) -> tuple[Tensor | None, ...]:
        dpred = None if dloss is None else _weighted_mse_backward_op(dloss, *ctx.saved_tensors)
        return dpred, *[None] * 8


def weighted_mse(
    pred: Tensor,
    x0: Tensor,
    x0_coef: Tensor,
    eps_coef: Tensor,
    weight: Tensor,
    seed: Tensor | int,
    position: Tensor,
    *,
    timestep_range: Tensor,
    ranges: int,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted squared error of each sample between a prediction and its diffusion target, and the unweighted one by timestep range.

    loss_b = weight_b mean (pred_b - x0_coef_b x0_b - eps_coef_b eps_b)^2        [Hang et al. 2023, Eq. 4-5, App. B]

    Args:
        pred: model output, [B, ...], fp32, bf16 or fp16.
        x0: clean latents or pixels, pred's shape, any of these types.
        x0_coef, eps_coef: [B] fp32, the target's parts; the noise is drawn again from (seed, position), and not at all where
            eps_coef is 0 (the reference draws it and multiplies by 0).
        weight: [B] fp32, dimensionless, already converted for the target.
        seed: [] int64 tensor on pred's device (an int costs a copy to the device).
        position: [B] int64, as given to `noising`.
        timestep_range: [B] int64, each sample's range; one outside [0, ranges) counts in the nearest (to refuse it, the host would have
            to wait for the device).
        ranges: how many ranges there are, at least 1.
        impl: "auto", "triton" or "reference".

    Returns:
        (loss [B], mse [B], by_range [ranges, 2]), all fp32 and accumulated in fp32; by_range holds each range's sum of mse and its count
        of samples. loss is differentiable in pred; mse and by_range are unweighted and not differentiable.

    Raises:
        ValueError: shapes, types or devices disagree, samples are empty, ranges is less than 1, or `impl` cannot run here.
    """
    require_float(pred=pred, x0=x0, x0_coef=x0_coef, eps_coef=eps_coef, weight=weight)
    if pred.shape != x0.shape or pred.dim() < 2 or pred.shape[1:].numel() == 0:
        raise ValueError(f"pred and x0 must both be [B, ...] with elements in each sample, got {list(pred.shape)} and {list(x0.shape)}")
    values = {"x0_coef": x0_coef, "eps_coef": eps_coef, "weight": weight}
    require_per_sample(pred.shape[0], **values, timestep_range=timestep_range)
    require_same_device(pred.device, x0=x0, **values, timestep_range=timestep_range)
    require_constant("pred", x0=x0, **values)
    if timestep_range.dtype != torch.int64 or ranges < 1:
        raise ValueError(f"timestep_range must be int64 and ranges at least 1, got {timestep_range.dtype} and {ranges}")
    seed = draw_key(seed, position, pred.shape[0], pred.device)
    if choose(impl, pred, x0) == "reference":
        plain = (pred, x0, x0_coef, eps_coef, weight, seed, position)
        return weighted_mse_reference(*plain, timestep_range=timestep_range, ranges=ranges)
    x0_coef, eps_coef, weight = (v.to(torch.float32).contiguous() for v in values.values())
    draw = (seed, position.contiguous())
    return _WeightedMse.apply(pred, x0, x0_coef, eps_coef, weight, *draw, timestep_range.contiguous(), ranges)
