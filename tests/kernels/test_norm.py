"""What adaln, gated_adaln and residual_norm share: how work is cut, what is read, how they are registered."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from fasttrain_kernels import norm
from fasttrain_kernels.cases import Case
from fasttrain_kernels.cases.norms import NORM_CASES, adaln_inputs, gated_adaln_inputs
from fasttrain_kernels.norm_kernels import BACKWARD, FORWARD, GATED_BACKWARD, settings
from torch import Tensor

from tests.kernels.calls import results
from tests.kernels.within_budget import require_within_budget

CPU = torch.device("cpu")
H200 = 132
"""Processors."""

every_norm = pytest.mark.parametrize("case", NORM_CASES.values(), ids=NORM_CASES)


@pytest.fixture
def launches() -> Iterator[list[Any]]:
    """What CPU tensors would launch."""
    pytest.importorskip("triton")
    from tests.kernels.interpreter import recording

    with recording() as recorded:
        yield recorded


@pytest.mark.parametrize("tiles", [FORWARD, BACKWARD, GATED_BACKWARD], ids=str)
def test_every_token_has_one_program_and_every_program_a_token(tiles: Any) -> None:
    pytest.importorskip("triton")
    for groups, tokens, processors, width in product((1, 2, 5, 32, 300, 5000), (1, 2, 17, 256, 258, 8192), (1, 7, H200), (33, 1152)):
        (programs, splits), share, _ = settings(width, groups, tokens, tiles, element_bytes=2, processors=processors)
        assert programs == groups
        assert (splits - 1) * share < tokens <= splits * share


@pytest.mark.parametrize("groups", [1, 32, 48, 128, 300, 1000])
def test_rounds_of_programs_are_nearly_full(groups: int) -> None:
    pytest.importorskip("triton")
    tokens = 8192 * 32 // groups
    (_, splits), share, _ = settings(1152, groups, tokens, BACKWARD, element_bytes=2, processors=H200)
    at_once = BACKWARD.warps // 2 * H200
    rounds = -(-groups * splits // at_once)
    assert groups * tokens / (rounds * at_once * share) > 0.8


@pytest.mark.parametrize(
    ("width", "blocks"),
    [(1, (1, 1)), (2, (1, 1)), (33, (32, 1)), (768, (512, 256)), (1024, (512, 512)), (1152, (1024, 128)), (1536, (1024, 512))],
)
def test_two_blocks_hold_a_row(width: int, blocks: tuple[int, int]) -> None:
    pytest.importorskip("triton")
    _, _, constants = settings(width, 1, 1, FORWARD, element_bytes=2, processors=1)
    assert (constants["MAIN"], constants["TAIL"]) == blocks


@pytest.mark.usefixtures("kernels", "poisoned")
@pytest.mark.parametrize("processors", [1, 2, 9])
@every_norm
def test_no_sample_takes_anothers_rows_however_tokens_are_cut(
    case: Case, processors: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 13 tokens divide into no number of programs, so that a program that counted tokens over samples would meet two samples.
    monkeypatch.setattr(norm, "processors", lambda _: processors)
    require_within_budget(partial(case.call, impl="triton"), case.reference, case.inputs((3, 13, 40), torch.float32, device))


def loss_of(which: Callable[[Tensor, Tensor], Tensor], outputs: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return which(*outputs) if isinstance(outputs, tuple) else outputs.square().sum()


only_y = pytest.param(lambda x_new, y: y.square().sum(), id="only-y")
only_x_new = pytest.param(lambda x_new, y: x_new.square().sum(), id="only-x_new")


@pytest.mark.usefixtures("kernels", "poisoned")
@pytest.mark.parametrize("which", [only_y, only_x_new])
@pytest.mark.parametrize("name", ["gated_adaln", "residual_norm"])
def test_an_output_that_is_not_used_passes_nothing_down(name: str, which: Callable[..., Tensor], device: torch.device) -> None:
    case = NORM_CASES[name]
    leaves = [t.requires_grad_() for t in case.inputs((2, 3, 40), torch.float32, device).values()]
    ours, theirs = (
        torch.autograd.grad(loss_of(which, case.call(*leaves, impl=impl)), leaves, allow_unused=True, materialize_grads=True)
        for impl in ("triton", "reference")
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["gated_adaln", "residual_norm"])
def test_a_gradient_that_is_not_there_is_not_read(name: str, launches: list[Any]) -> None:
    case = NORM_CASES[name]
    leaves = [t.requires_grad_() for t in case.inputs((2, 3, 40), torch.float32, CPU).values()]
    _, y = case.call(*leaves, impl="triton")
    y.sum().backward()
    assert [launch.bound()["dx_new"] for launch in launches if "dx_new" in launch.bound()] == [None]


def test_rows_of_a_wider_matrix_are_read_in_place(launches: list[Any]) -> None:
    x, branch, *_ = gated_adaln_inputs((3, 4, 48), torch.float32, CPU).values()
    gate, scale, shift = torch.randn(3, 6 * 48).requires_grad_().chunk(6, dim=1)[2:5]
    x_new, y = NORM_CASES["gated_adaln"].call(x, branch, gate, scale, shift, impl="triton")
    (x_new.sum() + y.sum()).backward()
    forward, backward, _ = (launch.bound() for launch in launches)
    for bound in (forward, backward):
        assert bound["gate"].data_ptr() == gate.data_ptr() and bound["gate_stride"] == 6 * 48
        assert bound["gain"].data_ptr() == scale.data_ptr() and bound["gain_stride"] == 6 * 48
    assert forward["shift"].data_ptr() == shift.data_ptr() and forward["shift_stride"] == 6 * 48


@pytest.mark.parametrize(
    ("name", "tiles", "width", "architecture"),
    [
        ("gated_adaln", GATED_BACKWARD, 768, "sm_90"),
        ("gated_adaln", GATED_BACKWARD, 1536, "sm_90"),
        ("residual_norm", BACKWARD, 1024, "sm_100"),
    ],
)
def test_the_programs_of_a_round_fit_a_processor(
    name: str, tiles: Any, width: int, architecture: str, launches: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    # Otherwise a round of programs would be two, the second nearly empty. Left to itself the assembler keeps the last of these to 96
    # registers a thread and spills.
    from tests.kernels.ahead_of_time import compile_launch

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    case = NORM_CASES[name]
    results(case.call, case.inputs((2, 4, width), torch.bfloat16, CPU), case, impl="triton")
    for launch, cut in zip(launches, (FORWARD, tiles), strict=False):
        compiled, warps = compile_launch(launch, architecture), launch.options()["num_warps"]
        programs = cut.warps // warps
        assert compiled.spilled_bytes == 0
        assert programs * warps * 32 * compiled.registers <= 65_536
        assert programs * (compiled.shared_bytes + 1024) <= 228 * 1024


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("has_branch", "has_gate", "has_shift"), [(False, False, True), (True, True, True), (True, False, False)])
def test_the_registered_operations_pass_torchs_own_checks(
    centred: bool, has_branch: bool, has_gate: bool, has_shift: bool, device: torch.device
) -> None:
    x, branch, gate, scale, shift = gated_adaln_inputs((2, 3, 5), torch.float32, device).values()
    branch, gate, shift = branch if has_branch else None, gate if has_gate else None, shift if has_shift else None
    forward = (x, branch, gate, scale, shift, True, centred, 1e-6)
    torch.library.opcheck(torch.ops.fasttrain.norm.default, forward)
    _, rstd, *rest = torch.ops.fasttrain.norm(*forward)
    mean = rest[0] if centred else None
    parts = 1 + has_gate + has_shift
    for dx_new in (torch.rand_like(x), None):
        backward = (torch.rand_like(x), dx_new, x, branch if has_gate else None, gate, scale, rstd, mean, True, parts)
        torch.library.opcheck(torch.ops.fasttrain.norm_backward.default, backward)


@pytest.mark.usefixtures("kernels")
def test_a_second_derivative_is_refused(device: torch.device) -> None:
    x, scale, shift = (t.requires_grad_() for t in adaln_inputs((2, 3, 8), torch.float32, device).values())
    (gradient,) = torch.autograd.grad(NORM_CASES["adaln"].call(x, scale, shift, impl="triton").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.usefixtures("kernels", "poisoned")
@pytest.mark.parametrize("shape", [(3, 1, 40), (3, 5, 1), (1, 7, 3), (4, 1, 1)], ids=str)
@every_norm
def test_sizes_of_one(case: Case, shape: tuple[int, int, int], device: torch.device) -> None:
    require_within_budget(partial(case.call, impl="triton"), case.reference, case.inputs(shape, torch.float32, device))
