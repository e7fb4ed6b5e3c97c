"""DeepSpeed, the only engine: its configuration merged from the run's, its start, and the little it needs shimmed."""

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fasttrain.engine.optimizer import AdamWEMA
from fasttrain.engine.spans import Spans
from fasttrain.engine.update import Borrowed
from fasttrain.errors import UserError
from fasttrain.registry import nearest, printable, shown


class Setting(NamedTuple):
    """What a setting may be: in words, and as a check."""

    words: str
    fits: Callable[[Any], bool]


_SWITCH = Setting("true or false", lambda value: isinstance(value, bool))
_COUNT = Setting("a whole number from 0 to 10^15", lambda value: type(value) in (int, float) and 0 <= value <= 1e15 and value == int(value))
_SIZE = Setting("a whole number from 1 to 10^15", lambda value: _COUNT.fits(value) and value > 0)
_MAPPING = Setting('a mapping such as {"stage": 1}', lambda value: isinstance(value, Mapping))
_COMMS = {
    **dict.fromkeys(("enabled", "prof_all", "verbose", "debug"), _SWITCH),
    "prof_ops": Setting("a list of names", lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value)),
}
_ALLOWED = {
    "zero_optimization": _MAPPING,
    "communication_data_type": Setting("fp32, bf16, fp16 or null", lambda value: value in (None, "fp32", "bf16", "fp16")),
    "prescale_gradients": _SWITCH,
    "gradient_predivide_factor": Setting("a number above 0", lambda value: type(value) in (int, float) and 0 < value <= 1e15),
    "comms_logger": Setting(
        'a mapping such as {"enabled": true}',
        lambda value: isinstance(value, Mapping) and all(name in _COMMS and _COMMS[name].fits(each) for name, each in value.items()),
    ),
}
# What training and checkpoints here are tested with.
_ZERO_ALLOWED = {
    "stage": Setting("0, 1, 2 or 3", lambda value: type(value) is int and 0 <= value <= 3),
    "offload_optimizer": Setting('{"device": "cpu"} or null', lambda value: True),  # looked at on its own
    "allgather_partitions": _SWITCH,
    "allgather_bucket_size": _SIZE,
    "contiguous_gradients": _SWITCH,
    "overlap_comm": _SWITCH,
    "reduce_bucket_size": _SIZE,
    "reduce_scatter": _SWITCH,
    "stage3_max_live_parameters": _COUNT,
    "stage3_max_reuse_distance": _COUNT,
    "stage3_param_persistence_threshold": _COUNT,
    "stage3_prefetch_bucket_size": _COUNT,
    "sub_group_size": _SIZE,
}
_ZERO_UNSUPPORTED = {
    "offload_param": "use more ranks or a higher stage",
    "round_robin_gradients": "checkpoints would name the parameters in another order",
}
_OFFLOAD_ALLOWED = ("device", "pin_memory")
_OWNED_BY_RUN = {
    "train_batch_size": "training.global_batch",
    "train_micro_batch_size_per_gpu": "training.micro_batch",
    "gradient_accumulation_steps": "training.global_batch and training.micro_batch",
    "gradient_clipping": "training.clip",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "optimizer": "optimizer",
    "scheduler": "optimizer.decay and optimizer.warmup_steps",
}


def read_settings(given: str | Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's own settings, from a JSON file's path or a mapping: only what the run's config does not say.

    Raises:
        UserError: no such file, not JSON, a key that belongs into the run's config, or an unknown key.
    """
    settings = _read_json(given) if isinstance(given, str) else dict(given)
    for key, value in settings.items():
        if key in _OWNED_BY_RUN:
            raise UserError(f"deepspeed: {key!r} conflicts with the run's config; remove it there and set {_OWNED_BY_RUN[key]} instead")
        if key not in _ALLOWED:
            raise UserError(f"deepspeed: unknown key {shown(key)}; {nearest(key, _ALLOWED)}")
        _check_type(key, value, _ALLOWED[key])
    _check_zero(settings.get("zero_optimization", {}))
    return settings


def _check_type(key: str, value: Any, wanted: Setting) -> None:
    """DeepSpeed's own mistakes of type come late, and as tracebacks."""
    if not wanted.fits(value):
        raise UserError(f"deepspeed: {key} must be {wanted.words}, got {shown(value)}")


def _check_zero(zero: Mapping[Any, Any]) -> None:
    for key, value in zero.items():
        if key in _ZERO_UNSUPPORTED:
            if value not in (None, False, {"device": "none"}):
                raise UserError(f"deepspeed: zero_optimization.{key} is not supported yet: remove it; {_ZERO_UNSUPPORTED[key]}")
        elif key not in _ZERO_ALLOWED:
            raise UserError(f"deepspeed: unknown key zero_optimization.{printable(key)}; {nearest(key, _ZERO_ALLOWED)}")
        else:
            _check_type(f"zero_optimization.{key}", value, _ZERO_ALLOWED[key])
    if zero.get("offload_optimizer") is not None:
        _check_offload(zero["offload_optimizer"], zero.get("stage", 0))


def _check_offload(offload: Any, stage: int) -> None:
    where = "deepspeed: zero_optimization.offload_optimizer"
    if not isinstance(offload, Mapping) or offload.get("device") not in ("none", "cpu"):
        raise UserError(f'{where} must be {{"device": "cpu"}} (no other device is supported) or {{"device": "none"}}, got {shown(offload)}')
    for key, value in offload.items():
        if key not in _OFFLOAD_ALLOWED:
            raise UserError(f"{where}: unknown key {shown(key)}; {nearest(key, _OFFLOAD_ALLOWED)}")
        if key == "pin_memory":
            _check_type("zero_optimization.offload_optimizer.pin_memory", value, _SWITCH)
    if offload["device"] == "cpu" and stage == 0:
        raise UserError(f"{where} needs ZeRO: set zero_optimization.stage to 1, 2 or 3, or remove it")


def zero_stage(settings: Mapping[str, Any]) -> int:
    """The ZeRO stage that these settings ask for, 0 to 3."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def offloads(settings: Mapping[str, Any]) -> bool:
    """Whether masters, moments and averages lie in the host's memory, and are updated there."""
    offload = settings.get("zero_optimization", {}).get("offload_optimizer")
    return offload is not None and offload["device"] == "cpu"


def build_engine(
    model: torch.nn.Module,
    optimizer: AdamWEMA,
    settings: Mapping[str, Any],
    *,
    micro_batch: int,
    accumulation_steps: int,
    precision: str,
    clip: float | None,
    whole: type[torch.nn.Module] | None = None,
) -> Any:
    """A DeepSpeedEngine over this model and optimizer, with the optimizer's state made, so that a checkpoint can be read at once.

    Args:
        precision: "bf16" (weights bf16, masters fp32) or "fp32".
        clip: largest gradient norm, or None.
        whole: the class of modules whose forward will be compiled. ZeRO 3 gathers each as one, so that its hooks stay outside.

    Raises:
        UserError: compiled modules would get no gradients.
    """
    if whole is not None and zero_stage(settings) == 3 and not compiles_under_zero_3():
        raise UserError(
            f"training.compile: with torch {torch.__version__} compiled blocks get no gradients under ZeRO 3, in silence (seen with 2.11, "
            "not with 2.13): install torch 2.13 or newer, set zero_optimization.stage to 2, or training.compile to false"
        )
    deepspeed = _import_deepspeed()
    if whole is not None and zero_stage(settings) == 3:
        deepspeed.utils.set_z3_leaf_modules(model, [whole])
    merged = {
        **settings,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": clip or 0.0,
        "bf16": {"enabled": precision == "bf16"},
        **_accumulation_type(zero_stage(settings), precision, accumulation_steps),
        "zero_allow_untested_optimizer": True,
        # Under offload DeepSpeed wants its CPU Adam itself; ours calls it, and keeps the averages.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=merged, dist_init_required=False)
    if zero_stage(settings) == 0 and precision == "fp32":
        _let_optimizer_guard(engine, optimizer, clip)
    return engine


def compiles_under_zero_3() -> bool:
    """Whether this torch is one with which blocks compiled under ZeRO 3 were seen to train: 2.13; with 2.11 they do not."""
    return torch.__version__ >= "2.13"


def accumulates_in_bf16(stage: int, precision: str, accumulation_steps: int) -> bool:
    """Whether micro-batches' gradients are summed in bf16, which rounds at each: DeepSpeed sums in fp32 from stage 2 on."""
    return precision == "bf16" and accumulation_steps > 1 and stage < 2


def _accumulation_type(stage: int, precision: str, accumulation_steps: int) -> dict[str, Any]:
    if precision == "fp32" or accumulation_steps == 1 or accumulates_in_bf16(stage, precision, accumulation_steps):
        return {}
    return {"data_types": {"grad_accum_dtype": "fp32"}}


def gradient_norm(engine: Any) -> float | None:
    """The norm of the last step's gradients, before clipping; not finite on a skipped step."""
    guarded = engine.basic_optimizer.grad_norm
    norm = guarded if guarded is not None else engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def time_gathers(engine: Any) -> Spans | None:
    """The spans in which forward passes wait for weights gathered from all ranks, from now on. None below ZeRO 3, which gathers none."""
    if engine.zero_optimization_stage() < 3:
        return None
    spans, coordinator = Spans(engine.device), engine.optimizer.parameter_offload.get_param_coordinator()
    fetch = coordinator.fetch_sub_module

    def timed(module: torch.nn.Module, forward: bool) -> None:
        if not forward:
            return fetch(module, forward)
        spans.begin()
        fetch(module, forward)
        spans.end()

    coordinator.fetch_sub_module = timed
    return spans


def full_gradients(engine: Any) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Each trained parameter's gradient, whole and averaged over ranks, between the last backward pass of a step and its update.

    A collective. None where there is no gradient.
    """
    deepspeed = _import_deepspeed()
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            yield name, deepspeed.utils.safe_get_full_grad(parameter)


def deepspeed_adam(place: torch.device, offloaded: bool) -> Borrowed:
    """DeepSpeed's Adam as AdamW for state on `place`: on a GPU its fused one, on the CPU its vectorised one. Builds it at first use.

    Raises:
        UserError: it does not build.
    """
    _import_deepspeed()
    from deepspeed.ops import adam

    if place.type == "cpu":
        made, words, settings = adam.DeepSpeedCPUAdam, f"DeepSpeed CPU Adam{' (offloaded)' if offloaded else ''}", {"adamw_mode": True}
    else:
        made, words, settings = adam.FusedAdam, "DeepSpeed FusedAdam", {"adam_w_mode": True}
    if os.environ.get("RANK", "0") == "0":
        print(f"{words}: DeepSpeed compiles it where it has not been yet, which takes minutes", flush=True)
    try:
        made([torch.zeros(1, device=place, requires_grad=True)], **settings)
    except Exception as error:  # whatever the compiler or its driver met
        raise UserError(
            f"optimizer: {words} does not build here: {error}; it needs a C++ compiler and ninja (and nvcc for a GPU), see `ds_report`; "
            "or set optimizer.implementation: torch"
        ) from error
    return Borrowed(lambda params: made(params, **settings), words)


def _let_optimizer_guard(engine: Any, optimizer: AdamWEMA, clip: float | None) -> None:
    """Without ZeRO and in fp32, DeepSpeed clips but never looks for a non-finite gradient: the optimizer does both."""
    optimizer.guard, optimizer.max_norm = True, clip
    engine._config.gradient_clipping = 0.0


def _import_deepspeed() -> Any:
    """DeepSpeed, quiet, and without the shared-memory op that it would compile for a minute at its first start on a CPU.

    The op only speeds up collectives of inference between processes of one CPU machine; the losses are the same without it.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed's use of torch's old collective names, told anew at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    return deepspeed


def _read_json(given: str) -> dict[str, Any]:
    try:
        content = Path(given).read_bytes()
    except FileNotFoundError:
        raise UserError(f"deepspeed: no file {printable(given)}; give the path of one such as configs/deepspeed/zero1.json") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"deepspeed: cannot read {printable(given)}: {getattr(error, 'strerror', None) or error}") from None
    try:
        settings = json.loads(content, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"deepspeed: {given} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"deepspeed: {given} must hold an object")
    return settings


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError(f"a key is given twice in the object of {', '.join(map(shown, made))}")
    return made
