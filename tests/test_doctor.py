"""The doctor tells what is there, imports nothing it examines, and survives a machine with nothing."""

import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fasttrain.doctor import PACKAGES, Finding, print_report, report

ROOT = Path(__file__).resolve().parents[1]


def finding(item: str) -> Finding:
    return next(found for found in report() if found.item == item)


def run(code: str, *options: str) -> str:
    """The output of a fresh interpreter that sees the source tree."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, *options, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_part_has_a_line():
    items = {found.item for found in report()}
    expected = {"Python", "CPU", "torch", "triton", "deepspeed", "webdataset", "diffusers", "C++ compiler", "flash-attn", "apex"}
    assert expected | {"Triton kernels", "attention", "operation adaln", "optimizer"} <= items
    assert any(item.startswith("GPU") for item in items)


def test_versions_are_the_installed_ones():
    for name in ("torch", "deepspeed", "webdataset"):
        assert finding(name) == Finding(name, importlib.metadata.version(name), "")


def test_operations_are_what_dispatch_chooses():
    from fasttrain_kernels.dispatch import OPERATIONS, here

    told = {found.item.removeprefix("operation "): found.finding for found in report() if found.item.startswith("operation ")}
    assert told == dict.fromkeys(OPERATIONS, here())


def test_ranges_are_those_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *extras["latents"], *extras["text"]]
    declared = {requirement.split(";")[0].strip() for requirement in declared}
    for package in PACKAGES:
        assert package.requirement() in declared


@pytest.mark.parametrize(
    ("version", "fine"), [("2.11.0", True), ("2.13.0+cpu", True), ("2.14.0a0+git1", False), ("2.10.1", False), ("main", False)]
)
def test_version_ranges(version, fine):
    torch = next(package for package in PACKAGES if package.name == "torch")
    assert torch.allows(version) is fine


def test_a_machine_with_nothing_gets_a_report():
    """Without site-packages there is no torch, no rich, nothing; every line still comes, with a remedy."""
    out = run("from fasttrain.doctor import report\nfor line in report(): print(tuple(line))", "-S")
    assert "('torch', 'not installed', \"pip install 'torch>=2.11,<2.14'\")" in out
    assert "('deepspeed', 'not installed', \"pip install 'deepspeed>=0.19.8,<0.20'\")" in out
    assert "('attention', \"could not be examined: ModuleNotFoundError: No module named 'torch'\"" in out
    assert "optimizer" in out


def test_importing_the_doctor_imports_nothing_heavy():
    heavy = "{'torch', 'deepspeed', 'triton', 'diffusers', 'rich', 'webdataset'}"
    assert run(f"import sys, fasttrain.doctor; print(sorted(set(sys.modules) & {heavy}))").strip() == "[]"


def test_reporting_imports_no_package_it_only_looks_at():
    looked_at = "{'deepspeed', 'diffusers', 'webdataset', 'apex', 'flash_attn'}"
    assert run(f"import sys; from fasttrain.doctor import report; report(); print(sorted(set(sys.modules) & {looked_at}))").strip() == "[]"


def install(folder: Path, *files: str) -> None:
    """Modules that fail when imported: the doctor must only look."""
    for file in files:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise RuntimeError('imported')\n")


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["apex/__init__.py", "apex/models.py"], "unrelated package"),
        (["apex/__init__.py", "apex/optimizers/__init__.py"], "NVIDIA's, without its CUDA extensions"),
        (["apex/__init__.py", "apex/optimizers/__init__.py", "amp_C.py"], "NVIDIA's, with CUDA extensions"),
        (["apex.py"], "unrelated package"),
    ],
)
def test_nvidias_apex_is_told_from_the_other(tmp_path, monkeypatch, files, told):
    install(tmp_path, *files)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert told in finding("apex").finding


def test_a_missing_compiler_has_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert finding("C++ compiler").finding == "none" and "install g++" in finding("C++ compiler").remedy


def test_the_table_prints(capsys):
    print_report()
    out = capsys.readouterr().out
    assert "fasttrain doctor" in out and "attention" in out
