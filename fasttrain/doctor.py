"""What this machine has, and what training here will use: `fasttrain doctor`.

Packages are found by their metadata and files, never imported, so that a broken one is reported rather than run into. Only torch is
imported, and only when the report is made.
"""

import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fasttrain.versions import installed

GIB = 2**30


class Finding(NamedTuple):
    """One line of the report; `remedy` is empty where nothing needs doing."""

    item: str
    finding: str
    remedy: str = ""


@dataclass(frozen=True)
class Package:
    """A distribution this project uses, the versions it is tested with (first allowed, first not allowed), and what is lost without it."""

    name: str
    first: tuple[int, ...]
    beyond: tuple[int, ...] = ()
    remedy: str = ""

    def allows(self, version: str) -> bool:
        """Whether the release part of a version ("2.13.0" of "2.13.0+cpu") is within the tested range."""
        release = re.match(r"[\d.]*", version)
        number = tuple(int(part) for part in release[0].split(".") if part) if release else ()
        return self.first <= number and (not self.beyond or number < self.beyond)

    def requirement(self) -> str:
        """As pip writes it: "torch>=2.11,<2.14"."""
        bounds = ((">=", self.first), ("<", self.beyond))
        return self.name + ",".join(sign + ".".join(map(str, bound)) for sign, bound in bounds if bound)


PACKAGES = (
    Package("torch", (2, 11), (2, 14)),
    Package("triton", (3, 6), (3, 8)),
    Package("deepspeed", (0, 19, 8), (0, 20)),
    Package("webdataset", (1, 0, 2), (2,)),
    Package("diffusers", (0, 36), remedy="needed for latents and the samplers ddim, ddpm and dpm_solver: pip install 'fasttrain[latents]'"),
    Package("transformers", (4, 57), remedy="needed to prepare text and for other prompts: pip install 'fasttrain[text]'"),
)


def report() -> list[Finding]:
    """Everything found, in the order in which it is told. Never raises: a check that fails says so in its line."""
    checks: tuple[Callable[[], Iterable[Finding]], ...] = (
        _python,
        _processor,
        _gpus,
        _packages,
        _compiler,
        _triton_runs,
        _flash_attention,
        _apex,
        _attention,
        _kernels,
        _optimizer,
    )
    return [finding for check in checks for finding in _guarded(check)]


def print_report() -> None:
    """The report as a table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table("item", "found", "what to do", title="fasttrain doctor")
    for item, finding, remedy in report():
        table.add_row(item, finding, remedy or "[green]fine[/]")
    Console().print(table)


def _guarded(check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    try:
        return list(check())
    except Exception as error:  # a doctor that crashes on a broken installation would be of no use there
        item = check.__name__.strip("_<>").replace("_", " ")
        return [Finding(item, f"could not be examined: {type(error).__name__}: {error}", "mend or reinstall it, then run the doctor again")]


def _python() -> Iterable[Finding]:
    version = platform.python_version()
    fine = (3, 11) <= tuple(map(int, platform.python_version_tuple()[:2])) < (3, 13)
    yield Finding("Python", f"{version} on {platform.platform()}", "" if fine else "use Python 3.11 or 3.12")


def _processor() -> Iterable[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("CPU", f"{cores} cores for this process")


def _gpus() -> Iterable[Finding]:
    if not _present("torch"):
        return
    import torch

    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "this torch is built without CUDA"
        yield Finding(
            "GPU", f"none; {built}: training runs on the CPU", "" if not torch.version.cuda else "check the driver with nvidia-smi"
        )
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found = f"{device.name}, {device.total_memory / GIB:.0f} GiB, capability {device.major}.{device.minor}, CUDA {torch.version.cuda}"
        yield Finding(f"GPU {index}", found, "" if device.major >= 8 else "no bf16 matrices before capability 8.0: train in fp32")


def _packages() -> Iterable[Finding]:
    for package in PACKAGES:
        version = installed(package.name)
        if version is None:
            yield Finding(package.name, "not installed", package.remedy or f"pip install '{package.requirement()}'")
        else:
            yield Finding(package.name, version, "" if package.allows(version) else f"tested with {package.requirement()}")


def _compiler() -> Iterable[Finding]:
    path = shutil.which(os.environ.get("CXX", "g++"))
    remedy = "only needed to offload the optimizer to the CPU (DeepSpeed builds its CPU Adam on first use): install g++"
    yield Finding("C++ compiler", path or "none", "" if path else remedy)


def _triton_runs() -> Iterable[Finding]:
    if not _present("triton"):
        yield Finding("Triton kernels", "cannot run: triton is not installed; torch references are used")
        return
    import torch

    if os.environ.get("TRITON_INTERPRET") == "1":
        yield Finding(
            "Triton kernels", "run in Triton's interpreter (TRITON_INTERPRET=1): for tests, very slow", "unset TRITON_INTERPRET to train"
        )
    elif torch.cuda.is_available():
        yield Finding("Triton kernels", "compiled for the GPU on first use")
    else:
        yield Finding("Triton kernels", "cannot run without a GPU; torch references are used")


def _flash_attention() -> Iterable[Finding]:
    if not _present("torch"):
        yield Finding("flash-attn", "not looked for without torch")
        return
    from fasttrain.models.attention import PACKAGES, missing

    found = [name for name in PACKAGES if missing(name) is None]
    told = f"{', '.join(found)}: measured beside torch's own attention" if found else "not installed; nothing needs it"
    yield Finding("flash-attn", told)


def _apex() -> Iterable[Finding]:
    """NVIDIA's apex holds `apex/optimizers` and, when its CUDA part was built, the module `amp_C`; the `apex` on PyPI has neither."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        yield Finding("apex", "not installed; only optimizer.implementation=apex needs it")
        return
    if not any(Path(folder, "optimizers").is_dir() for folder in spec.submodule_search_locations or ()):
        yield Finding(
            "apex",
            "the unrelated package of that name on PyPI, not NVIDIA's",
            "pip uninstall apex; NVIDIA's is in NGC containers or its repository",
        )
    elif importlib.util.find_spec("amp_C") is None:
        yield Finding(
            "apex",
            "NVIDIA's, without its CUDA extensions",
            "build it with --cpp_ext --cuda_ext; only optimizer.implementation=apex needs it",
        )
    else:
        yield Finding("apex", "NVIDIA's, with CUDA extensions: optimizer.implementation=apex can use it")


def _attention() -> Iterable[Finding]:
    from fasttrain.models.attention import describe

    yield Finding("attention", describe())


def _kernels() -> Iterable[Finding]:
    from fasttrain_kernels.dispatch import OPERATIONS, here

    for operation in OPERATIONS:
        yield Finding(f"operation {operation}", here())


def _optimizer() -> Iterable[Finding]:
    from fasttrain_kernels.dispatch import here

    apex = importlib.util.find_spec("amp_C") is not None
    others = f"torch, deepspeed{', apex' if apex else ''}; offloaded: DeepSpeed's CPU Adam"
    yield Finding("optimizer", f"fasttrain's AdamW with the averages (EMA) as its state, one pass: {here()}; ZeRO shards both; or {others}")


def _present(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
