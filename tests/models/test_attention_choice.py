"""The measurement that chooses attention: on a CPU there are two kernels to measure, so all of it but the choice itself is tried."""

import pytest
import torch

from fasttrain.models import attention_choice
from fasttrain.models.attention_choice import Shape, candidates, deterministic_choice, fastest, obstacle, timings

SMALL = Shape(2, 2, 16, 8, torch.float32)
CPU = torch.device("cpu")


def test_inputs_are_views_of_one_packed_matrix_as_in_the_network():
    q, k, v = SMALL.draw(CPU)
    assert q.shape == k.shape == v.shape == (2, 2, 16, 8)
    assert q.untyped_storage().data_ptr() == v.untyped_storage().data_ptr() and q.requires_grad and not q.is_contiguous()


def test_every_attention_that_runs_is_timed():
    seconds = timings(["flash", "math"], SMALL, CPU)
    assert set(seconds) == {"flash", "math"} and all(0 < time < 10 for time in seconds.values())


def test_what_does_not_run_is_left_out_with_its_reason():
    assert obstacle("math", SMALL, CPU) is None
    assert "No viable backend" in obstacle("cudnn", SMALL, CPU)
    assert "is not installed" in obstacle("flash_attn_3", SMALL, CPU)
    assert set(timings(["cudnn", "flash_attn_3", "math"], SMALL, CPU)) == {"math"}


def test_where_captions_have_padding_that_is_what_is_tried_and_timed():
    ragged = SMALL._replace(batch=3, ragged=6)
    assert str(ragged) == "3 x 2 heads x 16 tokens (up to 6 of padding) x 8, float32"
    assert obstacle("math", ragged, CPU) is None and list(timings(["math"], ragged, CPU)) == ["math"]
    assert "_flash_attention_forward" in obstacle("flash", ragged, CPU)  # torch's takes sequences by their bounds on GPUs only


def test_a_backward_pass_that_fails_is_an_obstacle(monkeypatch):
    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            return v.clone()

        @staticmethod
        def backward(ctx, grad):
            raise NotImplementedError("no backward at this head width")

    monkeypatch.setattr(attention_choice, "attention_function", lambda name, deterministic=False: Forward.apply)
    assert obstacle("flash", SMALL, CPU) == "NotImplementedError: no backward at this head width"


def test_what_breaks_a_graph_is_an_obstacle_only_where_blocks_are_compiled(monkeypatch):
    def breaking(q, k, v):
        torch._dynamo.graph_break()
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    assert obstacle("flash", SMALL, CPU, compiled=True) is None
    monkeypatch.setattr(attention_choice, "attention_function", lambda name, deterministic=False: breaking)
    assert obstacle("flash", SMALL, CPU) is None
    assert "graph_break" in obstacle("flash", SMALL, CPU, compiled=True)
    assert timings(["flash"], SMALL, CPU, compiled=True) == {} and list(timings(["flash"], SMALL, CPU)) == ["flash"]


def test_rounds_take_turns_and_the_median_counts(monkeypatch):
    order, took = [], iter([9.0, 1.0, 2.0, 1.5, 2.0, 1.5, 2.0, 1.5, 2.0, 100.0])
    monkeypatch.setattr(attention_choice, "_seconds", lambda run, device: order.append(run.args[0]) or next(took))
    seconds = timings(["flash", "math"], SMALL, CPU)
    assert seconds == {"flash": 2.0, "math": 1.5}
    assert order[:4] == order[2:6] and order[0] is not order[1]


def test_the_fastest_is_chosen(monkeypatch):
    monkeypatch.setattr(attention_choice, "timings", lambda *_, **__: {"flash": 2.0, "cudnn": 1.0, "efficient": 3.0})
    assert fastest(SMALL, torch.device("cuda")) == ("cudnn", {"flash": 2.0, "cudnn": 1.0, "efficient": 3.0})
    monkeypatch.setattr(attention_choice, "timings", lambda *_, **__: {})
    assert fastest(SMALL, torch.device("cuda")) == ("auto", {})


def test_a_cpu_is_not_measured():
    assert fastest(SMALL, CPU) == ("auto", {}) and deterministic_choice(SMALL, CPU) == "auto"


def test_candidates_are_what_is_installed():
    assert candidates()[:3] == ["flash", "cudnn", "efficient"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("head_width", [64, 72])
def test_on_a_gpu_something_is_chosen_that_runs(head_width):
    shape, device = Shape(8, 16, 256, head_width, torch.bfloat16), torch.device("cuda")
    chosen, seconds = fastest(shape, device)
    assert seconds[chosen] == min(seconds.values()) and obstacle(chosen, shape, device) is None
    assert deterministic_choice(shape, device) == "flash"
