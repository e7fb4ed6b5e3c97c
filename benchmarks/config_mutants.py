"""Wrong configs: the repository's own, broken in structure, in text, and on the command line; each a function of (seed, number)."""

import copy
import math
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks.config_vocabulary import COMPONENTS, KEYS, LINES, OPERATIONS, OWNED, REAL, VALUES, WHOLE, WORDS, ZERO_KEYS


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
    section[key] = copy.deepcopy(chance.choice(VALUES))
    return where


def known(chance: random.Random, raw: Any) -> str:
    """A key that there is, with a value of its type: usual, at a bound, or far beyond."""
    small, large = (0, 1, 2, 3, 4, 6, 8, 16, 100, 255, 256, 1000, 4096), (-1, 10**6, 10**9, 2**31, 2**63 - 1, 2**63, 10**18)
    real = (0.0, 1.0, 0.5, 2.5, 1e-8, 1e-300, 5e-324, 1e7, 1.1e7, 1e300, -0.0, -1.0, math.inf, math.nan)
    choices = {**dict.fromkeys(WHOLE, small + small + large), **dict.fromkeys(REAL, real), **WORDS}
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
        section[chance.choice(KEYS)] = section.pop(key)
    return where


def add(chance: random.Random, raw: Any) -> str:
    """A key that nobody asked for."""
    section, _, where = _place(chance, raw)
    if isinstance(section, dict):
        section[chance.choice(KEYS)] = copy.deepcopy(chance.choice(VALUES))
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
        section[key] = {"name": chance.choice(COMPONENTS), parameter: copy.deepcopy(chance.choice(VALUES))}
    return where


def kernels(chance: random.Random, raw: Any) -> str:
    """Implementations, operation by operation."""
    values = ("auto", "reference", "triton", "cuda", None, 3, ["auto"], {})
    raw["kernels"] = (
        {chance.choice(OPERATIONS): chance.choice(values) for _ in range(3)} if chance.random() < 0.7 else chance.choice(values)
    )
    return "kernels"


def zero_settings(chance: random.Random, raw: Any) -> str:
    """DeepSpeed's own settings, right and wrong."""
    zero: Any = {
        key: copy.deepcopy(chance.choice((*VALUES, True, 5e8, 1, 2, 3))) for key in chance.sample(ZERO_KEYS, chance.choice((1, 2)))
    }
    if chance.random() < 0.3:
        zero["offload_optimizer"] = {
            "device": chance.choice(("cpu", "none", "nvme", None, [])),
            chance.choice(("pin_memory", "x")): chance.choice(VALUES),
        }
    raw["deepspeed"] = {"zero_optimization": zero}
    if chance.random() < 0.4:
        raw["deepspeed"][chance.choice(OWNED)] = copy.deepcopy(chance.choice(VALUES))
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
    lines.insert(chance.randrange(len(lines) + 1), chance.choice(LINES).encode())
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
    value = chance.choice(VALUES)
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
