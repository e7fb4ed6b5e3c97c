"""Kernels are told apart by their names as profilers print them, and gaps between them are idle time."""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks.categories import Span, by_category, category, device_spans, host_waits, profiled


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_256x128_64x4_2x1_v_bz_coopA_NNT", "GEMM"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas", "GEMM"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>", "GEMM"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("_adaln_backward_kernel", "norm"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>", "norm"),
        ("_bias_gelu_forward_kernel", "GELU"),
        ("_adamw_ema_kernel", "optimizer"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::FusedAdamMathFunctor>", "optimizer"),
        ("_noising_kernel", "noise and loss"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("triton_red_fused_mul_sum_3", "Inductor's fusions"),
        ("triton_poi_fused__to_copy_add_1", "Inductor's fusions"),
        ("triton_red_fused_native_layer_norm_backward_2", "norm"),
        ("triton_poi_fused_add_addmm_mul_5", "Inductor's fusions"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_backward_clone_3", "Inductor's fusions"),
        ("triton_tem_fused_mm_1", "GEMM"),
        ("void at::native::elementwise_kernel<128, 4, mul>", "elementwise"),
        ("something_new", "other"),
    ],
)
def test_names(name: str, kind: str) -> None:
    assert category(name) == kind


def test_time_is_summed_and_gaps_are_idle() -> None:
    spans = [Span("nvjet_a", 0, 10), Span("_adaln_forward_kernel", 30, 40), Span("nvjet_b", 35, 60)]
    found = by_category(spans, steps=2)
    assert found["microseconds"] == {"GEMM": 17.5, "norm": 5.0}
    assert found["idle"] == 10.0 and found["kernels"] == 1.5
    assert by_category([], steps=1)["microseconds"] == {}


def test_a_mark_over_kernels_is_not_counted_beside_them() -> None:
    def event(name: str, begin: float, end: float, annotation: bool, device: str) -> SimpleNamespace:
        span = SimpleNamespace(start=begin, end=end)
        return SimpleNamespace(name=name, time_range=span, is_user_annotation=annotation, device_type=getattr(DeviceType, device))

    events = [
        event("## Call CompiledFxGraph ##", 0, 50, True, "CUDA"),
        event("nvjet_a", 0, 10, False, "CUDA"),
        event("aten::mm", 0, 5, False, "CPU"),
    ]
    assert device_spans(events) == [Span("nvjet_a", 0, 10)]


def test_a_profile_on_the_cpu_finds_the_product() -> None:
    a = torch.randn(200, 200)
    found = profiled(lambda: a @ a, torch.device("cpu"))
    assert found["microseconds"]["GEMM"] > 0


def test_a_cpu_never_waits() -> None:
    assert host_waits(lambda: None, torch.device("cpu"))["per_step"] is None
