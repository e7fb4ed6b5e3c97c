"""The command line: what it accepts from people and launchers, and how it tells mistakes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fasttrain.cli import ANALYSES, COMMANDS, SOURCES, main
from fasttrain.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def usage(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit status and the output of a command line that argparse ends."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    printed = capsys.readouterr()
    return int(end.value.code or 0), printed.out + printed.err


def test_help_lists_every_command(capsys):
    status, text = usage(capsys, "--help")
    assert status == 0 and all(re.search(rf"^    {name}\s", text, re.MULTILINE) for name in ("prepare", "analyse", *COMMANDS))


@pytest.mark.parametrize(
    "command",
    [(name,) for name in COMMANDS] + [("prepare", name) for name in SOURCES] + [("analyse", name) for name in ANALYSES],
    ids="-".join,
)
def test_every_command_explains_its_arguments(capsys, command):
    status, text = usage(capsys, *command, "--help")
    assert status == 0 and "--debug" in text and f"usage: fasttrain {' '.join(command)}" in text


def test_asking_for_help_does_not_wait_for_torch():
    code = "\n".join(
        (
            "import sys",
            "from fasttrain.cli import main",
            "try: main(sys.argv[1:])",
            "finally: print(sorted({'torch', 'deepspeed', 'diffusers'} & set(sys.modules)))",
        )
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    for arguments in ([], ["prepare"], ["analyse"], ["doctor"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments, "--help"], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "[]", arguments


@pytest.mark.parametrize(
    "arguments", [(), ("prepare",), ("trian", "x"), ("train",), ("train", "c.yaml", "--steps", "3"), ("export", "run", "out", "a=1")]
)
def test_wrong_usage_ends_with_status_2_and_says_how(capsys, arguments):
    status, text = usage(capsys, *arguments)
    assert status == 2 and "usage: fasttrain" in text


def test_a_stranger_among_the_arguments_is_named(capsys):
    _, text = usage(capsys, "train", "c.yaml", "--profiles", "3")
    assert "unknown arguments: --profiles" in text and "fasttrain train --help" in text


def test_a_mistake_is_one_line_and_status_2(capsys, tmp_path):
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == f"fasttrain: cannot read the config {tmp_path / 'none.yaml'}: No such file or directory\n"


def test_debug_shows_where(tmp_path):
    with pytest.raises(UserError, match="cannot read the config"):
        main(["train", str(tmp_path / "none.yaml"), "--debug"])


def test_only_the_first_rank_tells(capsys, tmp_path, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("spelling", ["--local_rank=3", "--local-rank=3"])
def test_launchers_may_put_the_local_rank_first(tmp_path, monkeypatch, capsys, spelling):
    monkeypatch.setenv("LOCAL_RANK", "to be removed")
    monkeypatch.delenv("LOCAL_RANK")
    assert main([spelling, "train", str(tmp_path / "none.yaml")]) == 2
    assert os.environ["LOCAL_RANK"] == "3" and "none.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    "order", [("{c}", "training.steps=0", "--dry-run"), ("{c}", "--dry-run", "training.steps=0"), ("--dry-run", "{c}", "training.steps=0")]
)
def test_overrides_may_stand_anywhere(tmp_path, capsys, order):
    config = tmp_path / "c.yaml"
    config.write_text("run_dir: run\ndata: {train: shards}\nmodel: vit-tiny\ntraining: {steps: 10, global_batch: 4}\n")
    assert main(["train", *(argument.format(c=config) for argument in order)]) == 2
    assert "training.steps: Input should be greater than 0 (got 0)" in capsys.readouterr().err


def test_the_module_runs_as_the_command_does(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, "-m", "fasttrain", "export", "-h"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "usage: fasttrain export" in done.stdout
