"""The optimizer's pass: its own facts. What holds for every operation is in test_cases.py, huge tensors in test_known_bugs.py."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fasttrain_kernels.adamw_ema import adamw_ema, adamw_ema_reference
from torch import Tensor

from tests.kernels.calls import budget, errors

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.9999), "eps": 1e-8, "weight_decay": 0.1, "update": 3}
DECAYS = (0.9, 0.999, 0.1, 0.5)
SIZES = ((33, 7), (0,), (40_000,), (1,), (1032,))
"""An odd one, an empty one, more than one program's share, one element, and a multiple of eight."""


def drawn(sizes: tuple[tuple[int, ...], ...], averages: int, grad: torch.dtype, weight: torch.dtype | None, device: torch.device) -> Any:
    """The arguments of an update: lists of tensors, the same for the same sizes."""
    generator = torch.Generator().manual_seed(1)

    def some(dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]

    params, grads, moments, squares = some(), some(grad), some(), [t.square() for t in some()]
    weights = None if weight is None else [torch.full_like(p, float("nan"), dtype=weight) for p in params]
    emas = [some() for _ in range(averages)]
    return [params, grads, moments, squares, emas], {**SETTINGS, "decays": DECAYS[:averages], "weights": weights}


def written(lists: list[Any], keywords: dict[str, Any]) -> Iterator[Tensor]:
    params, _, moments, squares, emas = lists
    for tensors in (params, moments, squares, *emas, keywords["weights"] or []):
        yield from tensors


def in_float64(lists: list[Any], keywords: dict[str, Any]) -> Any:
    params, grads, moments, squares, emas = lists
    wide = [[t.double() for t in tensors] for tensors in (params, grads, moments, squares)]
    weights = keywords["weights"] and [w.double() for w in keywords["weights"]]
    return [*wide, [[t.double() for t in ema] for ema in emas]], {**keywords, "weights": weights}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("averages", [0, 2, 3, 4])
@pytest.mark.parametrize(
    ("grad", "weight"), [(torch.bfloat16, torch.bfloat16), (torch.float16, None), (torch.float32, torch.float16)], ids=str
)
@pytest.mark.parametrize("sizes", [SIZES, SIZES[:1]], ids=["list", "one"])
def test_any_number_of_averages_and_any_types(
    sizes: tuple[tuple[int, ...], ...], grad: torch.dtype, weight: torch.dtype | None, averages: int, device: torch.device
) -> None:
    ours, plain, exact = (drawn(sizes, averages, grad, weight, device) for _ in range(3))
    exact = in_float64(*exact)
    adamw_ema(*ours[0], **ours[1], impl="triton")
    for lists, keywords in (plain, exact):
        adamw_ema_reference(*lists, **keywords)
    for mine, theirs, true in zip(written(*ours), written(*plain), written(*exact), strict=True):
        if true.numel() > 0:
            assert torch.isfinite(mine).all()
            assert all(found <= allowed for found, allowed in zip(errors(mine, true), budget(theirs, true), strict=True))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("sizes", [SIZES, SIZES[:1]], ids=["list", "one"])
def test_a_gradient_that_is_not_finite_changes_nothing(sizes: tuple[tuple[int, ...], ...], impl: str, device: torch.device) -> None:
    lists, keywords = drawn(sizes, 2, torch.float32, torch.bfloat16, device)
    before = [t.clone() for t in written(lists, keywords)]
    lists[1][0].fill_(float("inf"))
    scalars = {"clip": torch.tensor(float("nan"), device=device), "found_inf": torch.tensor(1.0, device=device)}
    adamw_ema(*lists, **keywords, **scalars, impl=impl)
    for after, old in zip(written(lists, keywords), before, strict=True):
        assert torch.equal(after.nan_to_num(7), old.nan_to_num(7))
    lists[1][0].fill_(1.0)
    adamw_ema(*lists, **keywords, clip=torch.tensor(0.5, device=device), found_inf=torch.tensor(0.0, device=device), impl=impl)
    assert not any(torch.equal(after, old) for after, old in zip(written(lists, keywords), before, strict=True) if old.numel() > 0)


@pytest.mark.usefixtures("kernels")
def test_tensors_at_odd_addresses_are_updated_too(device: torch.device) -> None:
    (params, grads, moments, squares, emas), keywords = drawn(((65,), (30,)), 1, torch.bfloat16, None, device)
    expected = [[t.clone() for t in tensors] for tensors in (params, grads, moments, squares)], [[t.clone() for t in emas[0]]]
    odd = [torch.cat([t[:1], t])[1:] for t in grads]
    assert any(t.data_ptr() % 16 for t in odd)
    adamw_ema(params, odd, moments, squares, emas, **keywords, impl="triton")
    adamw_ema_reference(*expected[0], expected[1], **keywords)
    for mine, theirs in zip([*params, *emas[0]], [*expected[0][0], *expected[1][0]], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("kernels")
def test_one_minus_a_decay_near_one_keeps_its_digits(device: torch.device) -> None:
    # Numbers of a launch are double in the interpreter and fp32 on a GPU: only there would a 1 - b2 taken in the kernel be seen.
    (params, grads, moments, squares, emas), keywords = drawn(((64,),), 1, torch.float32, None, device)
    for t in (moments[0], squares[0], emas[0][0]):
        t.zero_()
    adamw_ema(params, grads, moments, squares, emas, **{**keywords, "decays": (1 - 1e-6,)}, impl="triton")
    for ours, exact in ((squares[0], (1 - 0.9999) * grads[0].double() ** 2), (emas[0][0], 1e-6 * params[0].double())):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("sizes", [SIZES, SIZES[:1]], ids=["list", "one"])
def test_a_backward_pass_through_updated_weights_is_refused(sizes: tuple[tuple[int, ...], ...], device: torch.device) -> None:
    lists, keywords = drawn(sizes, 1, torch.float32, torch.bfloat16, device)
    before = [t._version for t in written(lists, keywords)]
    product = lists[1][0].requires_grad_() * lists[0][0]
    lists[1][0] = lists[1][0].detach()
    adamw_ema(*lists, **keywords, impl="triton")
    assert all(t._version > old for t, old in zip(written(lists, keywords), before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("odd", [False, True])
def test_wide_accesses_are_promised_only_where_every_address_allows_them(odd: bool) -> None:
    from tests.kernels.interpreter import recording

    lists, keywords = drawn(((65,), (30,)), 1, torch.bfloat16, None, CPU)
    if odd:
        lists[1][1] = torch.ones(31, dtype=torch.bfloat16)[1:]
    with recording() as launches:
        adamw_ema(*lists, **keywords, impl="triton")
    (launch,) = launches
    assert launch.bound()["ALIGNED"] is not odd


def test_the_reference_is_torchs_adamw(device: torch.device) -> None:
    p, generator = torch.nn.Parameter(torch.linspace(-1, 1, 50)), torch.Generator().manual_seed(0)
    theirs = torch.optim.AdamW([p], lr=1e-2, betas=(0.9, 0.9999), eps=1e-8, weight_decay=0.1)
    mine, m, v = p.detach().clone(), torch.zeros(50), torch.zeros(50)
    for update in (1, 2, 3):
        p.grad = torch.randn(50, generator=generator)
        theirs.step()
        adamw_ema([mine], [p.grad], [m], [v], [], **{**SETTINGS, "update": update}, decays=())
    torch.testing.assert_close(mine, p.detach(), rtol=1e-6, atol=1e-8)


def test_a_launch_is_one_for_a_list_and_no_number_specialises_it() -> None:
    from tests.kernels.ahead_of_time import Specialised
    from tests.kernels.interpreter import recording

    lists, keywords = drawn(SIZES, 1, torch.bfloat16, torch.bfloat16, CPU)
    with recording() as launches:
        for step in (1, 1000):
            changed = {"lr": 1e-3 / step, "update": step, "decays": (1 / step,)}
            adamw_ema(*lists, **{**keywords, **changed}, impl="triton")
    first, second = launches
    assert Specialised.of(first) == Specialised.of(second)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("count", [1, 2])
def test_the_registered_operation_passes_torchs_own_checks(count: int, device: torch.device) -> None:
    (params, grads, moments, squares, emas), _ = drawn(((9,),) * count, 1, torch.float32, None, device)
    numbers = (0.1, 0.99, 0.01, 0.5, 1e-8, 0.999, 0.01)
    clip = torch.tensor(0.5, device=device)
    torch.library.opcheck(
        torch.ops.fasttrain.adamw_ema.default, (params, grads, moments, squares, emas[0], [], clip, None, numbers, (0.5,))
    )


def test_no_tensors_are_no_work() -> None:
    adamw_ema([], [], [], [], [], **SETTINGS, decays=())


@pytest.mark.gpu
def test_a_graph_replays_an_update_of_many_tensors(device: torch.device) -> None:
    captured, eager = (drawn(SIZES, 1, torch.bfloat16, torch.bfloat16, device) for _ in range(2))
    adamw_ema(*eager[0], **eager[1], impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adamw_ema(*captured[0], **captured[1], impl="triton")
    graph.replay()
    for ours, theirs in zip(written(*captured), written(*eager), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
def test_an_update_does_not_wait_for_the_device(device: torch.device) -> None:
    scalars = {"clip": torch.tensor(0.5, device=device), "found_inf": torch.tensor(0.0, device=device)}
    for impl in ("triton", "reference"):
        lists, keywords = drawn(SIZES, 1, torch.bfloat16, torch.bfloat16, device)
        adamw_ema(*lists, **keywords, **scalars, impl=impl)
        torch.cuda.set_sync_debug_mode("error")
        try:
            adamw_ema(*lists, **keywords, **scalars, impl=impl)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": []}, "grads must hold 1 tensors, one for each of params, got 0"),
        ({"exp_avgs": [torch.ones(4)]}, r"exp_avgs\[0\] must have the shape of params\[0\], \[3\], got \[4\]"),
        ({"exp_avg_sqs": [torch.ones(3).bfloat16()]}, r"exp_avg_sqs\[0\] must be torch.float32.*got torch.bfloat16"),
        ({"params": [torch.ones(3).bfloat16()]}, r"params\[0\] must be torch.float32"),
        ({"emas": [[torch.ones(3, device="meta")]]}, r"emas\[0\]\[0\] is on meta, params\[0\] on cpu"),
        ({"grads": [torch.ones(3, dtype=torch.int32)]}, "grads must be of a floating-point type, got torch.int32"),
        ({"decays": ()}, "decays must hold one number for each of the 1 averages, got 0"),
        ({"update": 0}, "update must be 1 or more, got 0"),
        ({"clip": torch.ones(2)}, r"clip must be one fp32 number on the device, got \[2\] torch.float32"),
        ({"found_inf": torch.tensor(True)}, r"found_inf must be one fp32 number on the device, got \[\] torch.bool"),
        ({"clip": torch.ones((), device="meta")}, "clip is on meta"),
        ({"impl": "cuda"}, "unknown impl 'cuda'"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, Any], message: str) -> None:
    lists, keywords = drawn(((3,),), 1, torch.float32, None, CPU)
    given = dict(zip(("params", "grads", "exp_avgs", "exp_avg_sqs", "emas"), lists, strict=True))
    with pytest.raises(ValueError, match=message):
        adamw_ema(**{**given, **keywords, **change})
