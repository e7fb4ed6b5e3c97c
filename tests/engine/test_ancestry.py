"""Which ancestors are launchers, and what the death of one does: on command lines, and on real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fasttrain.engine.ancestry import Ancestor, is_launcher

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("command", "launcher"),
    [
        (["/usr/bin/python3.11", "-u", "-m", "deepspeed.launcher.launch", "--world_info=e30=", "--module", "fasttrain"], True),
        (["/venv/bin/python", "/venv/bin/deepspeed", "--hostfile", "hosts", "--module", "fasttrain", "train", "c.yaml"], True),
        (["/venv/bin/python", "/venv/bin/torchrun", "--nproc_per_node", "8", "-m", "fasttrain", "train", "c.yaml"], True),
        (["python", "-X", "dev", "-W", "ignore", "-m", "torch.distributed.run", "x.py"], True),
        (["python", "-m", "fasttrain", "supervise", "--", "deepspeed"], True),
        (["/venv/bin/python", "/venv/bin/fasttrain", "supervise", "--", "deepspeed"], True),
        (["pdsh", "-S", "-f", "1024", "-w", "a,b"], True),
        (["mpirun", "-n", "2", "python", "x.py"], True),
        (["python", "-m", "fasttrain", "train", "c.yaml"], False),
        (["python", "-m", "pytest"], False),
        (["python", "run_deepspeed_jobs.py"], False),
        (["python", "-c", "import deepspeed"], False),
        (["-bash"], False),
        (["tmux", "new", "deepspeed"], False),
        (["vim", "deepspeed"], False),
        ([""], False),
        ([], False),
    ],
)
def test_launchers_are_known_by_what_they_run(command: list[str], launcher: bool):
    assert is_launcher(command) is launcher


def test_a_process_with_the_number_of_a_dead_one_is_not_it():
    field = Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[19]
    assert Ancestor(os.getpid(), field, "me").lives()
    assert not Ancestor(os.getpid(), str(int(field) - 1), "another").lives()
    ended = subprocess.Popen(["true"])
    time.sleep(0.2)
    began = Path(f"/proc/{ended.pid}/stat").read_text().rpartition(")")[2].split()[19]
    assert not Ancestor(ended.pid, began, "ended, and nobody has waited for it").lives()
    ended.wait()


RANK = """
import signal, sys, time
from fasttrain.engine.ancestry import Orphanhood, end_with_parent, launchers
signal.signal(signal.SIGTERM, lambda number, frame: (print("asked to stop", flush=True), sys.exit(0)))
print(*[launcher.name for launcher in launchers()], flush=True)
if {parent}:
    end_with_parent()
look = Orphanhood(tells=True)
while True:
    if not {parent}:
        look()
    time.sleep(0.05)
"""
LAUNCHER = "import subprocess, sys; subprocess.run([*sys.argv[1:]])"


def _family(folder: Path, rank: str, above: list[list[str]]) -> subprocess.Popen[str]:
    """A rank with these programs above it, the farthest first; each starts the next and waits."""
    for name in ("deepspeed", "nothing"):
        (folder / name).write_text(LAUNCHER)
    (folder / "rank.py").write_text(rank)
    command = [sys.executable, str(folder / "rank.py")]
    for before in reversed(above):
        command = [*before, *command] if before[-1] != "-c" else [*before, " ".join(command) + "; true"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (folder / "out").open("w") as out:
        return subprocess.Popen(command, stdout=out, env=environment, start_new_session=True)


def _told(path: Path, wanted: str, seconds: float) -> str:
    """What was printed, once this is in it or so long has passed."""
    deadline = time.monotonic() + seconds
    while wanted not in path.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    return path.read_text()


@pytest.mark.parametrize("parent", [True, False])
@pytest.mark.parametrize(
    ("above", "seen"),
    [
        (["deepspeed"], 1),
        (["deepspeed", "sh"], 2),
        (["deepspeed", "sh", "deepspeed"], 3),
        (["deepspeed", "nothing"], 0),
        (["nothing"], 0),
        (["sh"], 0),
    ],
)
def test_the_farthest_launcher_dies(parent: bool, above: list[str], seen: int, tmp_path: Path):
    """Only who is below launchers throughout is asked to stop; by the kernel, only below one."""
    programs = [["sh", "-c"] if name == "sh" else [sys.executable, str(tmp_path / name)] for name in above]
    process = _family(tmp_path, RANK.replace("{parent}", str(parent)), programs)
    asked = seen == 1 if parent else seen > 0
    try:
        assert len(_told(tmp_path / "out", "\n", 30).split()) == seen
        time.sleep(0.3)
        process.kill()
        process.wait()
        assert ("asked to stop" in _told(tmp_path / "out", "asked to stop", 10 if asked else 1)) is asked
    finally:
        os.killpg(process.pid, signal.SIGKILL)
