"""Wrong configs: the repository's own, broken in structure, in text, and on the command line; each a function of (seed, number)."""

import copy
import datetime
import math
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

CANARY = "canary"
_EXECUTING = (
    f"__import__('os').system('touch {CANARY}')",
    f"$(touch {CANARY})",
    f"`touch {CANARY}`",
    f"; touch {CANARY}",
    f"pipe:touch {CANARY}",
    f"!!python/object/apply:os.system ['touch {CANARY}']",
    f"{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}; touch {CANARY}",
)
_PATHS = (
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
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 3.5, -0.5, 1e-300, 1e308, math.inf, -math.inf, math.nan),
    *(10**9, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, -(10**400)),
    *("", " ", "x" * 50_000, "\x1b[31mred", "nan", "1e-4", "0x10", "1_000", "yes", "null", "auto", "cuda", "reference", "1,2", "[]"),
    *([], {}, [[]], [1, 2, 3], [None], ["a", {"b": []}], {"name": "x"}, {"name": ["cosine"]}, {"a": {"b": {}}}, {1: 2}, {None: None}),
    *(datetime.date(2020, 1, 1), b"\xff\xfe", {"a", "b"}, [0.9] * 1000, {str(i): i for i in range(500)}),
    *_EXECUTING,
    *_PATHS,
)
_KEYS: tuple[Any, ...] = (
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
_COMPONENTS = (
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
_ZERO_KEYS = (
    "stage",
    "offload_optimizer",
    "offload_param",
    "reduce_bucket_size",
    "overlap_comm",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
)
_OWNED = ("train_batch_size", "optimizer", "fp16", "bf16", "comms_logger", "communication_data_type", "prescale_gradients", "elasticity")
_OPERATIONS = ("default", "adaln", "uniform", "adamw_ema", "noising", "adalm", "")
_WHOLE = (
    *("seed", "data.held_out", "data.streams", "data.window_shards", "data.threads", "data.ahead", "data.size", "training.steps"),
    *("training.global_batch", "training.micro_batch", "training.max_skipped", "training.checksum_every", "checkpoint.every"),
    *("checkpoint.keep_last", "checkpoint.keep_every", "sampling.every", "sampling.count", "sampling.steps", "log.every"),
    *("log.held_out_every", "log.timestep_ranges", "optimizer.warmup_steps", "model.depth", "model.width", "model.heads", "model.patch"),
    *("model.num_classes", "model.channels", "model.input_size", "model.num_timesteps", "diffusion.schedule.num_timesteps"),
)
_REAL = (
    *("training.clip", "training.timeout_seconds", "checkpoint.retry_seconds", "optimizer.learning_rate", "optimizer.eps"),
    *("optimizer.weight_decay", "diffusion.label_drop", "sampling.guidance", "log.spike", "data.max_damaged", "data.cache_gib"),
    *("data.retry_seconds", "diffusion.weighting.gamma", "diffusion.schedule.num_timesteps"),
)
_WORDS = {
    "attention": ("auto", "flash", "math", "flash_attn_4", "none"),
    "training.precision": ("bf16", "fp32", "fp16"),
    "training.compile": (True, False, "yes", 2),
    "data.normalise": ("channel", "vae", "none"),
    "data.vae": ("stabilityai/sd-vae-ft-mse", "sd-vae-ft-mse", "other", "/"),
    "optimizer.decay": ("constant", "cosine", "linear", "step"),
    "optimizer.ema": (
        [],
        [{"half_life": 1}],
        [{"half_life": 1e300, "ramp": None}] * 3,
        [{"half_life": 0}],
        [{"half_life": 5, "ramp": 1e-300}],
    ),
    "optimizer.betas": ([0, 0], [0.9, 0.999], [1, 1], [0.5], [0.1, 0.2, 0.3], "0.9"),
    "optimizer.implementation": ("fasttrain", "torch", "apex", "deepspeed", "adam"),
    "diffusion.prediction": ("x0", "eps", "v", "flow"),
    "diffusion.weighting": ("const", "snr", "min_snr", "max_snr", "soft_min_snr", "min-snr"),
    "diffusion.schedule": (
        "cosine",
        "linear",
        "scaled_linear",
        {"name": "linear", "zero_terminal": True},
        {"name": "cosine", "num_timesteps": 2},
    ),
    "run_dir": (".", "a/b/c", "..", "", "x" * 300, "a\0b", "\n", "run dir", "run.yaml", "run.yaml/x", "/dev/null/x"),
    "deepspeed": tuple(f"configs/deepspeed/zero{stage}.json" for stage in range(5)),
}
_LINES = (
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


class Mutant(NamedTuple):
    """A config file's bytes, overrides for the command line, and what was done to them."""

    content: bytes
    overrides: list[str]
    done: list[str]


def mutant(bases: list[dict[str, Any]], seed: int, number: int) -> Mutant:
    """The mutant of a number: one to three changes of structure, or of text, or both, and now and then overrides."""
    chance = random.Random(f"{seed}/{number}")
    raw, done = copy.deepcopy(chance.choice(bases)), list[str]()
    kind = chance.random()
    for _ in range(chance.choice((1, 1, 1, 2, 3)) if kind < 0.8 else 0):
        change = chance.choice(_STRUCTURAL)
        done.append(f"{change.__name__}: {change(chance, raw)}"[:120])
    content = _written(raw, chance).encode("utf-8", "surrogatepass")
    for _ in range(chance.choice((1, 1, 2, 4)) if kind > 0.75 else 0):
        change_text = chance.choice(_TEXTUAL)
        content = change_text(chance, content)
        done.append(change_text.__name__)
    overrides = [_override(chance, raw) for _ in range(chance.choice((1, 1, 2)))] if chance.random() < 0.25 else []
    return Mutant(content, overrides, [*done, *(f"override {each}"[:120] for each in overrides)])


def _written(raw: dict[Any, Any], chance: random.Random) -> str:
    return yaml.safe_dump(raw, sort_keys=False, default_flow_style=chance.choice((None, False)), allow_unicode=True)


def _sections(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    """Every mapping and list in it, with its path."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    found = [(path, node)] if isinstance(node, dict | list) and node else []
    return found + [each for key, value in inner for each in _sections(value, (*path, key))]


def _place(chance: random.Random, raw: Any) -> tuple[Any, Any, str]:
    path, section = chance.choice(_sections(raw) or [((), {"x": 1})])
    key = chance.choice(list(section) if isinstance(section, dict) else range(len(section)))
    return section, key, ".".join(map(str, (*path, key)))


def replace(chance: random.Random, raw: Any) -> str:
    """Another value, of any type and size."""
    section, key, where = _place(chance, raw)
    section[key] = copy.deepcopy(chance.choice(_VALUES))
    return where


def known(chance: random.Random, raw: Any) -> str:
    """A key that there is, with a value of its type: usual, at a bound, or far beyond."""
    small, large = (0, 1, 2, 3, 4, 6, 8, 16, 100, 255, 256, 1000, 4096), (-1, 10**6, 10**9, 2**31, 2**63 - 1, 2**63, 10**18)
    real = (0.0, 1.0, 0.5, 2.5, 1e-8, 1e-300, 5e-324, 1e7, 1.1e7, 1e300, -0.0, -1.0, math.inf, math.nan)
    choices = {**dict.fromkeys(_WHOLE, small + small + large), **dict.fromkeys(_REAL, real), **_WORDS}
    where = chance.choice(list(choices))
    *parents, key = where.split(".")
    section = raw
    for parent in parents:
        if not isinstance(section.get(parent), dict):
            section[parent] = {"name": section[parent]} if isinstance(section.get(parent), str) else {}
        section = section[parent]
    section[key] = copy.deepcopy(chance.choice(choices[where]))
    return f"{where} = {section[key]!r}"


def scale(chance: random.Random, raw: Any) -> str:
    """A number near the old one, or far away."""
    section, key, where = _place(chance, raw)
    value = section[key]
    if type(value) in (int, float):
        section[key] = chance.choice((-value, value * 10, value + 1, value / 3, value - 1, str(value), [value], float(value), value * 1000))
    return where


def misspell(chance: random.Random, raw: Any) -> str:
    """A key with a letter too few, too many or exchanged."""
    section, key, where = _place(chance, raw)
    if isinstance(section, dict) and isinstance(key, str) and key:
        at = chance.randrange(len(key))
        section[key[:at] + chance.choice(("", key[at] * 2, chance.choice(string.ascii_letters))) + key[at + 1 :]] = section.pop(key)
    return where


def remove(chance: random.Random, raw: Any) -> str:
    """One key or element less."""
    section, key, where = _place(chance, raw)
    del section[key]
    return where


def rename(chance: random.Random, raw: Any) -> str:
    """A key that stands for something else, or no text at all."""
    section, key, where = _place(chance, raw)
    if isinstance(section, dict):
        section[chance.choice(_KEYS)] = section.pop(key)
    return where


def add(chance: random.Random, raw: Any) -> str:
    """A key that nobody asked for."""
    section, _, where = _place(chance, raw)
    if isinstance(section, dict):
        section[chance.choice(_KEYS)] = copy.deepcopy(chance.choice(_VALUES))
    return where


def nest(chance: random.Random, raw: Any) -> str:
    """A value one level deeper, or many."""
    section, key, where = _place(chance, raw)
    for _ in range(chance.choice((1, 1, 2, 30, 60))):
        section[key] = chance.choice(({str(key): section[key]}, [section[key]]))
    return where


def move(chance: random.Random, raw: Any) -> str:
    """A key in another section."""
    section, key, where = _place(chance, raw)
    value = section.pop(key) if isinstance(section, dict) else section[key]
    target, name, there = _place(chance, raw)
    if isinstance(target, dict):
        target[key if isinstance(key, str) else name] = copy.deepcopy(value)  # which may be what holds the target
    return f"{where} -> {there}"


def component(chance: random.Random, raw: Any) -> str:
    """Another component, or one's parameters on another."""
    where = chance.choice(("model", "diffusion.schedule", "diffusion.prediction", "diffusion.weighting", "diffusion.timesteps"))
    *parents, key = where.split(".")
    section = raw.get(parents[0]) if parents else raw
    if isinstance(section, dict):
        parameter = chance.choice(
            ("gamma", "depth", "width", "heads", "patch", "num_timesteps", "zero_terminal", "rotary", "qk_norm", "norm")
        )
        section[key] = {"name": chance.choice(_COMPONENTS), parameter: copy.deepcopy(chance.choice(_VALUES))}
    return where


def kernels(chance: random.Random, raw: Any) -> str:
    """Implementations, operation by operation."""
    values = ("auto", "reference", "triton", "cuda", None, 3, ["auto"], {})
    raw["kernels"] = (
        {chance.choice(_OPERATIONS): chance.choice(values) for _ in range(3)} if chance.random() < 0.7 else chance.choice(values)
    )
    return "kernels"


def zero_settings(chance: random.Random, raw: Any) -> str:
    """DeepSpeed's own settings, right and wrong."""
    zero: Any = {
        key: copy.deepcopy(chance.choice((*_VALUES, True, 5e8, 1, 2, 3))) for key in chance.sample(_ZERO_KEYS, chance.choice((1, 2)))
    }
    if chance.random() < 0.3:
        zero["offload_optimizer"] = {
            "device": chance.choice(("cpu", "none", "nvme", None, [])),
            chance.choice(("pin_memory", "x")): chance.choice(_VALUES),
        }
    raw["deepspeed"] = {"zero_optimization": zero}
    if chance.random() < 0.4:
        raw["deepspeed"][chance.choice(_OWNED)] = copy.deepcopy(chance.choice(_VALUES))
    return "deepspeed"


def flip_bits(chance: random.Random, text: bytes) -> bytes:
    """A few single bits."""
    broken = bytearray(text)
    for _ in range(chance.choice((1, 2, 8))):
        if broken:
            broken[chance.randrange(len(broken))] ^= 1 << chance.randrange(8)
    return bytes(broken)


def insert(chance: random.Random, text: bytes) -> bytes:
    """Characters that mean something to YAML, or to a terminal, or nothing."""
    at = chance.randrange(len(text) + 1)
    parts = (
        b"\0",
        b"\xff",
        b"\t",
        b"\r",
        b"\x1b[2J",
        b": ",
        b"- ",
        b"*",
        b"&a ",
        b"!",
        b"|",
        b">",
        b"{",
        b"]",
        b"'",
        b'"',
        b"#",
        b"%",
        b"\n",
        b"\xef\xbb\xbf",
        b"?",
    )
    return text[:at] + chance.choice(parts) * chance.choice((1, 1, 3)) + text[at:]


def cut(chance: random.Random, text: bytes) -> bytes:
    """The end, or a piece, is missing."""
    at = chance.randrange(len(text) + 1)
    return text[:at] if chance.random() < 0.5 else text[:at] + text[at + chance.randrange(1, 40) :]


def double_line(chance: random.Random, text: bytes) -> bytes:
    """A line twice."""
    lines = text.split(b"\n")
    at = chance.randrange(len(lines))
    return b"\n".join([*lines[: at + 1], lines[at], *lines[at + 1 :]])


def swap_lines(chance: random.Random, text: bytes) -> bytes:
    """Two lines exchanged, or one indented otherwise."""
    lines = text.split(b"\n")
    one, other = chance.randrange(len(lines)), chance.randrange(len(lines))
    lines[one], lines[other] = lines[other], chance.choice((b"", b" ", b"    ")) + lines[one]
    return b"\n".join(lines)


def add_line(chance: random.Random, text: bytes) -> bytes:
    """Tags, bombs, endless nesting, second documents."""
    lines = text.split(b"\n")
    lines.insert(chance.randrange(len(lines) + 1), chance.choice(_LINES).encode())
    return b"\n".join(lines)


def noise(chance: random.Random, text: bytes) -> bytes:
    """No config at all."""
    return chance.choice(
        (chance.randbytes(chance.choice((0, 1, 50, 5000))), text * 100, text.decode(errors="replace").encode("utf-16"), b"- a", b"3")
    )


def _override(chance: random.Random, raw: Any) -> str:
    wrong = (
        "=",
        "a",
        "a=",
        "=b",
        "a..b=1",
        ".=1",
        "..=1",
        "a.b.c.d.e=1",
        "x" * 9000 + "=1",
        "data.train=[",
        "training",
        "\0=1",
        "seed.low=3",
    )
    if chance.random() < 0.3:
        return chance.choice(wrong)
    path = _place(chance, raw)[2]
    value = chance.choice(_VALUES)
    text = value if isinstance(value, str) and chance.random() < 0.5 else yaml.safe_dump(value, default_flow_style=True).strip()
    return f"{path}={text}"


_STRUCTURAL: tuple[Callable[[random.Random, Any], str], ...] = (
    *(known,) * 16,
    *(replace,) * 4,
    *(scale,) * 3,
    *(misspell, remove, rename, add, nest, move, component, component, kernels, zero_settings, zero_settings),
)
_TEXTUAL: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    flip_bits,
    flip_bits,
    insert,
    insert,
    cut,
    double_line,
    swap_lines,
    add_line,
    add_line,
    noise,
)


def read_bases(configs: Path) -> list[dict[str, Any]]:
    """The repository's own configs, as data."""
    return [yaml.safe_load(path.read_text()) for path in run_configs(configs)]


def run_configs(configs: Path) -> list[Path]:
    """The files that are runs: what is for launchers is not ours to read."""
    return [path for path in sorted(configs.glob("**/*.yaml")) if path.parent.name != "launch"]
