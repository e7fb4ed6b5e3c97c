"""What computes a run: what is asked for is used or refused by name, what is measured is decided once, and all of it is told."""

import pytest
import torch
from fasttrain_kernels.dispatch import OPERATIONS, Kernels, here

from fasttrain import choices
from fasttrain.choices import check_kernels, choose_attention, describe_kernels
from fasttrain.engine.distributed import Processes
from fasttrain.errors import UserError
from fasttrain.models import MODELS

MODEL = MODELS.build({"name": "vit", "input_size": 8, "channels": 1, "num_classes": 10, "width": 32, "heads": 4})


class Alone(Processes):
    """One process of two, without a group: rank 0 decides `decided`."""

    decided: object = None

    def from_main(self, item):
        assert (item is None) != self.is_main
        return item if self.is_main else self.decided


def alone(rank: int = 0, device: str = "cpu") -> Alone:
    return Alone(rank, 2, rank, torch.device(device), None)  # type: ignore[arg-type] (nothing travels)


def test_the_kernels_are_told_in_one_word_where_they_are_one():
    assert describe_kernels(Kernels()) == f"{here()} for all {len(OPERATIONS)}"
    assert describe_kernels(Kernels("reference", {"adaln": "auto"})) == f"reference (asked for), {here()} for adaln"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run here")
def test_kernels_that_cannot_run_are_refused_by_their_key():
    seed = torch.tensor(0)
    check_kernels(Kernels("auto", {"adaln": "reference"}), seed)
    with pytest.raises(UserError, match=r"kernels: impl='triton' cannot run here"):
        check_kernels(Kernels("triton"), seed)
    with pytest.raises(UserError, match=r"kernels\.qk_norm: impl='triton' cannot run here"):
        check_kernels(Kernels("auto", {"qk_norm": "triton"}), seed)


def choose(wanted: str, processes: Processes, deterministic: bool = False, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    return choose_attention(wanted, MODEL, 2, dtype, processes, deterministic=deterministic, compiled=False)


def test_what_is_asked_for_is_tried_first():
    assert choose("math", alone()) == ("math", "math (asked for)")
    with pytest.raises(
        UserError, match="attention: cudnn cannot run at 2 x 4 heads x 18 tokens x 8, float32 on cpu: RuntimeError: No viable"
    ):
        choose("cudnn", alone())
    with pytest.raises(UserError, match=r"flash_attn_3 cannot run .* the module flash_attn_interface is not installed: install it from"):
        choose("flash_attn_3", alone())


def test_a_cpu_takes_torchs_own_choice():
    assert choose("auto", alone()) == ("auto", "torch scaled_dot_product_attention, its own choice")
    assert choose("auto", alone(), deterministic=True)[0] == "auto"


def test_rank_0_measures_and_the_others_follow(monkeypatch):
    asked = []
    measured = ("cudnn", {"flash": 2e-4, "cudnn": 1e-4})
    monkeypatch.setattr(choices, "fastest", lambda shape, device, compiled: asked.append(shape) or measured)
    told = "cudnn, the fastest at 2 x 4 heads x 18 tokens x 8, bfloat16 (microseconds forward and backward: cudnn 100, flash 200)"
    assert choose("auto", alone(), dtype=torch.bfloat16) == ("cudnn", told)
    assert asked == [(2, 4, 18, 8, torch.bfloat16, 0)]
    follower = alone(rank=1)
    object.__setattr__(follower, "decided", measured)
    assert choose("auto", follower, dtype=torch.bfloat16) == ("cudnn", told) and len(asked) == 1
