"""What a figure depends on: the device, its driver and clocks, the versions, the commit; and the folder where its results belong."""

import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "triton", "numpy", "deepspeed", "webdataset", "liger-kernel", "quack-kernels", "apex", "flash-attn")
SMI_FIELDS = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)


def environment(device: torch.device) -> dict[str, Any]:
    """Everything that a figure measured on `device` depends on, as plain values for JSON."""
    found = {
        "device": device_name(device),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: installed(package) for package in PACKAGES if installed(package)},
        "commit": commit(),
    }
    return {**found, **_gpu(device)} if device.type == "cuda" else found


def timed_device(name: str, smoke: bool) -> torch.device:
    """The device to take times on. Ends the program where that makes no sense: without a GPU only a smoke run does."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: times are taken on a GPU; `--device cpu --smoke` only tries that everything runs")
    if device.type != "cuda" and not smoke:
        raise SystemExit(f"times on {name} would say nothing of the kernels: use a GPU, or add --smoke to try that everything runs")
    return device


def results_folder(device: torch.device) -> Path:
    """benchmarks/results/<device>: "nvidia-h200", "nvidia-h100", ... or "cpu"."""
    return RESULTS / device_name(device)


def device_name(device: torch.device) -> str:
    """The device's name as a folder: a GPU's model without its memory and its socket."""
    return short_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else "cpu"


def short_name(full: str) -> str:
    """A GPU's full name, such as "NVIDIA H100 80GB HBM3", as a folder's: "nvidia-h100"."""
    words = re.sub(r"\b(\d+\s?GB|HBM\d\w?|SXM\d?|Graphics|GeForce|Tesla)\b", " ", full.replace("-", " ")).lower()
    return "-".join(re.findall(r"[a-z0-9]+", words)) or "unknown"


def processor() -> str:
    """The processor's model name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit measured, marked where files differ from it; None without git or a repository."""
    if shutil.which("git") is None:
        return None
    head, changed = _output("git", "rev-parse", "HEAD"), _output("git", "status", "--porcelain", "--untracked-files=no")
    return f"{head}, with changes" if head and changed else head


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvidia_smi": nvidia_smi(device.index or 0),
    }


def nvidia_smi(index: int) -> dict[str, str] | None:
    """Driver, clocks, power and temperature at this moment; None where nvidia-smi does not answer."""
    if shutil.which("nvidia-smi") is None:
        return None
    told = _output("nvidia-smi", f"--id={index}", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader")
    values = [value.strip() for value in told.split(",")] if told else []
    return dict(zip(SMI_FIELDS, values, strict=True)) if len(values) == len(SMI_FIELDS) else None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
