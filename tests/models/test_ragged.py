"""Attention among captions of different lengths: masked and packed give what each caption gives alone, forward and backward."""

import math

import pytest
import torch

from fasttrain.models.attention import ragged_attention
from fasttrain.models.ragged import Masked, Packed, by_package, one_after_another, own_last

TEXT, IMAGE = 7, 9
WAYS = {"masked": ragged_attention("auto", packed=False), "packed": ragged_attention("auto", packed=True)}
LENGTHS = [torch.tensor([3, 7, 1, 0, 5]), torch.tensor([7, 7, 7]), torch.tensor([4])]


def drawn(batch: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """q, k and v [B, h, T, d] as the joint norm leaves them: tokens before heads in memory."""
    return [torch.randn(batch, TEXT + IMAGE, 3, 8).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3)]


def alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: torch.Tensor) -> list[torch.Tensor]:
    """Each sample's own tokens [1, h, n, d], attention written out in float64."""
    outs = []
    for number, own in enumerate(length.tolist()):
        a, b, c = (x[number : number + 1, :, TEXT - own :].double() for x in (q, k, v))
        outs.append((a @ b.transpose(2, 3) / math.sqrt(a.shape[-1])).softmax(-1) @ c)
    return outs


def run(
    way: str, inputs: list[torch.Tensor], length: torch.Tensor, upstream: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    attend = WAYS[way]
    out = attend(*inputs, attend.where(length, TEXT, IMAGE))
    own = torch.arange(TEXT + IMAGE) >= TEXT - length[:, None]  # [B, T]
    return out, torch.autograd.grad(out, inputs, upstream * own[:, None, :, None])


@pytest.mark.parametrize("length", LENGTHS, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_every_caption_attends_as_if_alone(way, length):
    inputs = drawn(len(length))
    upstream = torch.randn(inputs[0].shape)
    out, gradients = run(way, inputs, length, upstream)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = alone(*wide, length)
    loss = sum((e * upstream[i : i + 1, :, TEXT - own :]).sum() for i, (e, own) in enumerate(zip(expected, length.tolist(), strict=True)))
    assert out.isfinite().all()
    for number, own in enumerate(length.tolist()):
        torch.testing.assert_close(out[number : number + 1, :, TEXT - own :].double(), expected[number], rtol=1e-5, atol=1e-6)
    for found, exact in zip(gradients, torch.autograd.grad(loss, wide), strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)
        for number, own in enumerate(length.tolist()):
            assert not found[number, :, : TEXT - own].any(), "padding got a gradient"


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_packed_equals_masked(dtype, close):
    """At random lengths; bf16 within two units in the last place of the largest values."""
    for seed in range(5):
        torch.manual_seed(seed)
        length = torch.randint(0, TEXT + 1, (6,))
        inputs = drawn(6, dtype)
        upstream = torch.randn(inputs[0].shape).to(dtype)
        (masked, *_), (packed, *_) = pair = [run(way, inputs, length, upstream) for way in WAYS]
        own = (torch.arange(TEXT + IMAGE) >= TEXT - length[:, None])[:, None, :, None]
        torch.testing.assert_close(masked * own, packed * own, rtol=close, atol=close)
        for one, other in zip(pair[0][1], pair[1][1], strict=True):
            torch.testing.assert_close(one, other, rtol=close, atol=4 * close)


def test_packing_copies_nothing_and_its_sizes_do_not_depend_on_the_lengths():
    seen = []

    def varlen(q, k, v, bounds, longest):
        seen.append((q.data_ptr(), q.shape, tuple(bounds.shape), longest))
        assert bounds.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == q.shape[0]
        return one_after_another(q, k, v, bounds, longest)

    attend, inputs = Packed(varlen), drawn(3)
    for length in (torch.tensor([1, 2, 3]), torch.tensor([7, 0, 7])):
        out = attend(*inputs, attend.where(length, TEXT, IMAGE))
        assert out.shape == inputs[0].shape
    assert seen[0] == seen[1] == (inputs[0].data_ptr(), torch.Size([3 * 16, 3, 8]), (7,), 16)


def test_a_package_gets_the_bounds_of_both_and_its_determinism():
    def function(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic):
        assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k == 16 and deterministic
        return one_after_another(q, k, v, cu_seqlens_q, max_seqlen_q), None

    attend, inputs, length = Packed(by_package(function, deterministic=True)), drawn(2), torch.tensor([2, 5])
    plain, _ = run("packed", inputs, length, torch.ones(2, 3, 16, 8))
    assert torch.equal(attend(*inputs, attend.where(length, TEXT, IMAGE)), plain)


def test_own_tokens_are_moved_behind_the_padding_in_their_order():
    tokens = torch.tensor([[1, 2, 3, 0], [4, 0, 0, 0], [5, 6, 7, 8], [0, 0, 0, 0]])[..., None]
    moved = own_last(tokens, torch.tensor([3, 1, 4, 0]))
    assert moved[..., 0].tolist() == [[0, 1, 2, 3], [0, 0, 0, 4], [5, 6, 7, 8], [0, 0, 0, 0]]


def test_the_way_follows_the_attention_unless_asked_for():
    assert isinstance(ragged_attention("auto"), Masked) and isinstance(ragged_attention("math"), Masked)
    assert isinstance(ragged_attention("flash"), Packed)
    length = torch.tensor([2, 5])
    inputs = drawn(2)
    attend = ragged_attention("math")
    torch.testing.assert_close(
        run("masked", inputs, length, torch.ones(2, 3, 16, 8))[0], attend(*inputs, attend.where(length, TEXT, IMAGE))
    )


def test_masks_compile_whole():
    attend, inputs = WAYS["masked"], drawn(3)
    where = attend.where(torch.tensor([3, 7, 1]), TEXT, IMAGE)
    compiled = torch.compile(attend.__call__, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, where), attend(*inputs, where))
