"""Kernels run natively where a GPU is, and in Triton's interpreter elsewhere: the same tests, chosen here."""

from collections.abc import Callable, Iterator

import pytest
import torch
from fasttrain_kernels.language import HAS_TRITON

NEED_TRITON = ["test_ahead_of_time.py", "test_interpreter.py", "test_known_bugs.py", "test_philox_kernels.py", "test_reports.py"]
collect_ignore = [] if HAS_TRITON else NEED_TRITON


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def device() -> torch.device:
    """Where kernels are tested: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def kernels(device: torch.device) -> Iterator[None]:
    """Makes impl="triton" run on `device`."""
    if device.type == "cuda":
        yield
        return
    pytest.importorskip("triton")
    from tests.kernels.interpreter import interpreting

    with interpreting():
        yield


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh tensors hold NaN, so that an element nobody wrote is seen."""

    def with_nan(create: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def created(*args: object, **kwargs: object) -> torch.Tensor:
            tensor = create(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return created

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, with_nan(getattr(torch, name)))
