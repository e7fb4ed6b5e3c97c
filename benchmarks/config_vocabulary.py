"""What wrong configs are made of: values, keys, names, numbers and lines that a start must refuse or bear."""

import datetime
import math
from typing import Any

CANARY = "canary"
EXECUTING = (
    f"__import__('os').system('touch {CANARY}')",
    f"$(touch {CANARY})",
    f"`touch {CANARY}`",
    f"; touch {CANARY}",
    f"pipe:touch {CANARY}",
    f"!!python/object/apply:os.system ['touch {CANARY}']",
    f"{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}; touch {CANARY}",
)
PATHS = (
    "/etc/passwd",
    "/dev/zero",
    "/dev/null/x",
    "/proc/self/mem",
    "..",
    ".",
    "/",
    "~",
    "a\0b",
    "configs/deepspeed",
    "x" * 5000,
    "é\u202e",
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 3.5, -0.5, 1e-300, 1e308, math.inf, -math.inf, math.nan),
    *(10**9, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, -(10**400)),
    *("", " ", "x" * 50_000, "\x1b[31mred", "nan", "1e-4", "0x10", "1_000", "yes", "null", "auto", "cuda", "reference", "1,2", "[]"),
    *([], {}, [[]], [1, 2, 3], [None], ["a", {"b": []}], {"name": "x"}, {"name": ["cosine"]}, {"a": {"b": {}}}, {1: 2}, {None: None}),
    *(datetime.date(2020, 1, 1), b"\xff\xfe", {"a", "b"}, [0.9] * 1000, {str(i): i for i in range(500)}),
    *EXECUTING,
    *PATHS,
)
KEYS: tuple[Any, ...] = (
    "",
    "name",
    "train",
    "stage",
    "zero_optimization",
    "__class__",
    "model_config",
    "x" * 3000,
    "a\nb",
    1,
    None,
    True,
    2.5,
    (1, 2),
)
COMPONENTS = (
    "vit",
    "dit",
    "vit-b/2",
    "dit-tiny",
    "cosine",
    "linear",
    "scaled_linear",
    "x0",
    "eps",
    "v",
    "min_snr",
    "snr",
    "const",
    "uniform",
)
ZERO_KEYS = (
    "stage",
    "offload_optimizer",
    "offload_param",
    "reduce_bucket_size",
    "overlap_comm",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
)
OWNED = ("train_batch_size", "optimizer", "fp16", "bf16", "comms_logger", "communication_data_type", "prescale_gradients", "elasticity")
OPERATIONS = ("default", "adaln", "uniform", "adamw_ema", "noising", "adalm", "")
WHOLE = (
    *("seed", "data.held_out", "data.streams", "data.window_shards", "data.threads", "data.ahead", "data.size", "training.steps"),
    *("training.global_batch", "training.micro_batch", "training.max_skipped", "training.checksum_every", "checkpoint.every"),
    *("checkpoint.keep_last", "checkpoint.keep_every", "sampling.every", "sampling.count", "sampling.sampler.steps", "log.every"),
    *("log.held_out_every", "log.timestep_ranges", "optimizer.warmup_steps", "model.depth", "model.width", "model.heads", "model.patch"),
    *("model.num_classes", "model.channels", "model.input_size", "model.num_timesteps", "diffusion.schedule.num_timesteps"),
)
REAL = (
    *("training.clip", "training.timeout_seconds", "checkpoint.retry_seconds", "optimizer.learning_rate", "optimizer.eps"),
    *(
        "optimizer.weight_decay",
        "diffusion.label_drop",
        "diffusion.control_drop",
        "sampling.guidance",
        "log.spike",
        "data.max_damaged",
        "data.cache_gib",
    ),
    *("data.retry_seconds", "diffusion.weighting.gamma", "diffusion.schedule.num_timesteps", "diffusion.schedule.rescale"),
    *("sampling.sampler.rho", "sampling.guidance.controls", "sampling.guidance.resolution", "diffusion.timesteps.std"),
)
WORDS = {
    "attention": ("auto", "flash", "math", "flash_attn_4", "none"),
    "training.precision": ("bf16", "fp32", "fp16"),
    "training.compile": (True, False, "yes", 2),
    "data.normalise": ("channel", "vae", "none"),
    "data.vae": ("stabilityai/sd-vae-ft-mse", "sd-vae-ft-mse", "other", "/"),
    "optimizer.decay": ("constant", "cosine", "linear", "step", "demon", {"name": "demon", "floor": 1}),
    "optimizer.momentum_decay": ({}, None, {"floor": 0.5}, {"floor": 2}, {"steps": 0}, {"compensate": "yes", "flor": 1}, "demon"),
    "optimizer.ema": (
        [],
        [{"half_life": 1}],
        [{"half_life": 1e300, "ramp": None}] * 3,
        [{"half_life": 0}],
        [{"half_life": 5, "ramp": 1e-300}],
    ),
    "optimizer.betas": ([0, 0], [0.9, 0.999], [1, 1], [0.5], [0.1, 0.2, 0.3], "0.9"),
    "optimizer.implementation": ("fasttrain", "torch", "apex", "deepspeed", "adam"),
    "diffusion.prediction": ("x0", "eps", "v", "flow", "edm", {"name": "edm", "sigma_data": 0}),
    "diffusion.weighting": (
        "const",
        "snr",
        "min_snr",
        "max_snr",
        "soft_min_snr",
        {"name": "clamped_snr", "floor": 9},
        "flow",
        "min-snr",
        {"name": "edm", "gamma": 5},
        {"name": "p2", "k": 0},
    ),
    "diffusion.uncertainty": (True, False, "no", 1),
    "diffusion.timesteps": (
        "uniform",
        "logit_normal",
        {"name": "logit_normal", "mean": 1e300},
        {"name": "logit_normal", "stratified": True},
        "curriculum",
        {"name": "curriculum", "images": 1, "std": 1e-9},
    ),
    "sampling.sampler": (
        "heun",
        "euler",
        "ddim",
        {"name": "ddim", "eta": 2},
        {"name": "dpm_solver", "order": 9},
        {"name": "heun", "rho": 1e300},
    ),
    "sampling.guidance": (1.5, {"scale": 4, "interval": [0.2, 0.8]}, {"interval": [1, 0]}, {"controls": 1.4}, {"scale": 1e300}, []),
    "diffusion.schedule": (
        "cosine",
        "linear",
        "scaled_linear",
        {"name": "linear", "zero_terminal": True},
        {"name": "cosine", "num_timesteps": 2},
        {"name": "flow", "shift": 3},
        "edm",
        {"name": "edm", "std": 0},
        {"name": "cosine", "rescale": 1e300},
    ),
    "run_dir": (".", "a/b/c", "..", "", "x" * 300, "a\0b", "\n", "run dir", "run.yaml", "run.yaml/x", "/dev/null/x"),
    "deepspeed": tuple(f"configs/deepspeed/zero{stage}.json" for stage in range(5)),
}
LINES = (
    f"x: !!python/object/apply:os.system ['touch {CANARY}']",
    f"x: !!python/object/new:os.system ['touch {CANARY}']",
    "x: !!python/name:os.system",
    "x: &a [*a]",
    "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{d}: &{d} [{','.join(['*' + c] * 9)}]\n" for c, d in zip("abcdefgh", "bcdefghi", strict=True)),
    *(
        "<<: 3",
        "? [a, b]\n: c",
        "--- 2",
        "%YAML 9.9",
        "x: !!set {a, b}",
        "x: !!binary /w==",
        "x: 2020-13-45",
        "x: 0x_",
        "x: !!bool z",
        "\tx: 1",
    ),
    *("[" * 3000, "x: " + "{a: " * 2000, "x: *nobody", "x: |\n y", "model: dit-tiny", "seed: 1\nseed: 2", "training: {steps: 1, steps: 2}"),
)
