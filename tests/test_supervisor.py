"""The supervisor, as the command that users start, over real processes that fail, are killed and leave others behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from fasttrain.supervisor import ended, is_training, split_command

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 20.0


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """`fasttrain supervise *arguments`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "fasttrain", "supervise", *arguments]
    return subprocess.Popen(command, env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def supervise(*arguments: str, cwd: Path) -> tuple[int, str]:
    """Its status and output."""
    process = start(*arguments, cwd=cwd)
    return process.wait(TIMEOUT), process.communicate()[0]


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + TIMEOUT
    while not path.exists() or not path.read_text().endswith("\n"):
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.02)
    return path.read_text().strip()


def counted(tmp_path: Path, then: str) -> list[str]:
    """A command that writes down each start, and does `then` with its number in $n."""
    return ["--", "bash", "-c", f"echo >> starts; n=$(wc -l < starts); {then}"]


def starts(tmp_path: Path) -> int:
    return len((tmp_path / "starts").read_text().splitlines())


@pytest.fixture
def trainings(tmp_path: Path) -> Iterator[Path]:
    """A program that the supervisor takes for a training: it writes down its number and the signal that it ends on."""
    script = tmp_path / "fasttrain"
    script.write_text(
        "import os, signal, sys, time\n"
        "def stop(number, frame):\n"
        "    time.sleep(0.3)\n"
        "    print(f'got {number} saved', file=open(f'got{os.getpid()}', 'w'))\n"
        "    os._exit(128 + number)\n"
        "for number in (2, 15): signal.signal(number, stop)\n"
        "print(os.getpid(), file=open('training', 'w'))\n"
        "time.sleep(60)\n"
    )
    yield script
    left = [p for p in psutil.process_iter(["cmdline"]) if str(script) in (p.info["cmdline"] or [])]
    for process in left:
        process.kill()
    assert not left, "trainings were left behind"


@pytest.mark.parametrize("status", [0, 2, 3])
def test_what_a_restart_does_not_change_ends_it_with_the_same_status(status: int, tmp_path: Path):
    assert supervise(*counted(tmp_path, f"exit {status}"), cwd=tmp_path)[0] == status
    assert starts(tmp_path) == 1


@pytest.mark.parametrize("end", ["exit 138", "exit 1", "exit 143", "kill -9 $$"])
def test_anything_else_is_started_again_and_told_in_one_line(end: str, tmp_path: Path):
    status, told = supervise(*counted(tmp_path, f"[ $n = 2 ] || {end}"), cwd=tmp_path)
    assert status == 0
    assert starts(tmp_path) == 2
    [line] = told.splitlines()
    assert "after 0 s; starting again in 1 s (restart 1 of at most 10 within 3600 s)" in line


def test_it_gives_up_after_so_many_restarts_with_the_last_status(tmp_path: Path):
    status, told = supervise("--restarts", "1", *counted(tmp_path, "exit 138"), cwd=tmp_path)
    assert status == 138
    assert starts(tmp_path) == 2
    assert "given up: restarted 1 times within 3600 s" in told.splitlines()[-1]


def test_restarts_before_the_window_do_not_count(tmp_path: Path):
    status, _ = supervise("--restarts", "1", "--window", "0.5", *counted(tmp_path, "[ $n = 3 ] || exit 1"), cwd=tmp_path)
    assert status == 0
    assert starts(tmp_path) == 3


def test_what_a_start_left_behind_is_ended_before_the_next(tmp_path: Path):
    """Also when the command itself says that all is well: DeepSpeed's runner ends with 0 when the launcher below it was killed."""
    leaves = "setsid sleep 60 & echo $! > orphan"
    survives = "pgrep -F orphan > survived"
    status, told = supervise(*counted(tmp_path, f"if [ $n = 1 ]; then {leaves}; else {survives}; exit 0; fi"), cwd=tmp_path)
    assert status == 0
    assert starts(tmp_path) == 2
    assert "leaving 1 process behind" in told
    assert (tmp_path / "survived").read_text() == ""


def test_what_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path):
    stubborn = "(trap '' TERM; echo > stubborn; exec sleep 60) & while [ ! -e stubborn ]; do :; done"
    began = time.monotonic()
    status, told = supervise("--grace", "1", *counted(tmp_path, f"[ $n = 2 ] || {{ {stubborn}; exit 1; }}"), cwd=tmp_path)
    assert status == 0
    assert "leaving 1 process behind" in told
    assert time.monotonic() - began < TIMEOUT


def test_the_launcher_alone_is_killed(tmp_path: Path, trainings: Path):
    """Its training becomes the supervisor's own, saves, and has ended before anything starts again."""
    launcher = f"{sys.executable} {trainings} train & wait"
    process = start(*counted(tmp_path, f"[ $n = 2 ] || {{ {launcher}; }}"), cwd=tmp_path)
    number = wait_for(tmp_path / "training")
    [command] = psutil.Process(process.pid).children()
    command.kill()
    told = process.communicate(timeout=TIMEOUT)[0]
    assert process.returncode == 0
    assert "ended with 137: SIGKILL" in told
    assert (tmp_path / f"got{number}").read_text() == "got 15 saved\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_goes_straight_to_the_training_and_is_the_end(number: signal.Signals, tmp_path: Path, trainings: Path):
    """The launcher between them neither passes it on nor hears of it, and ends with a status of its own."""
    launcher = f"{sys.executable} {trainings} --local_rank=0 train; exit 1"
    process = start(*counted(tmp_path, launcher), cwd=tmp_path)
    training = wait_for(tmp_path / "training")
    process.send_signal(number)
    assert process.wait(TIMEOUT) == 128 + number
    assert starts(tmp_path) == 1
    assert (tmp_path / f"got{training}").read_text() == f"got {int(number)} saved\n"


def test_without_trainings_here_a_stop_goes_to_the_launcher(tmp_path: Path):
    process = start(*counted(tmp_path, "trap 'echo asked > asked; exit 7' TERM; echo > up; while :; do sleep 0.1; done"), cwd=tmp_path)
    wait_for(tmp_path / "up")
    process.terminate()
    assert process.wait(TIMEOUT) == 128 + signal.SIGTERM
    assert (tmp_path / "asked").exists()


def test_a_command_can_ask_in_place_of_a_signal(tmp_path: Path):
    waits = "trap 'echo > signalled' TERM; echo > up; while [ ! -e asked ]; do sleep 0.1; done; exit 143"
    process = start("--stop", f"touch {tmp_path}/asked", *counted(tmp_path, waits), cwd=tmp_path)
    wait_for(tmp_path / "up")
    process.terminate()
    assert process.wait(TIMEOUT) == 143
    assert not (tmp_path / "signalled").exists()


def test_a_stop_between_two_starts_is_the_end(tmp_path: Path):
    process = start(*counted(tmp_path, "[ $n -gt 2 ] && sleep 60; exit 1"), cwd=tmp_path)
    while not (tmp_path / "starts").exists() or starts(tmp_path) < 2:
        time.sleep(0.02)
    time.sleep(0.5)  # it pauses for 2 s now
    process.terminate()
    assert process.wait(1.5) == 143
    assert starts(tmp_path) == 2


def test_its_own_death_is_the_launchers(tmp_path: Path):
    process = start(*counted(tmp_path, "trap 'echo > ended; exit 1' TERM; echo > up; while :; do sleep 0.1; done"), cwd=tmp_path)
    wait_for(tmp_path / "up")
    process.kill()
    wait_for(tmp_path / "ended")


def test_a_command_that_cannot_be_started_is_the_users_mistake(tmp_path: Path):
    status, told = supervise("--", "./nonesuch", cwd=tmp_path)
    assert status == 2
    assert told == "fasttrain: supervise: cannot start './nonesuch': No such file or directory; give a program behind `--`\n"
    assert supervise(cwd=tmp_path)[0] == 2
    assert supervise("--grace", "-1", "--", "true", cwd=tmp_path)[0] == 2


def test_the_commands_own_words_are_left_alone(tmp_path: Path):
    status, told = supervise("--", "echo", "--local_rank=3", "train", "--", "--help", cwd=tmp_path)
    assert (status, told) == (0, "--local_rank=3 train -- --help\n")


def test_it_imports_no_torch():
    seen = "import sys, fasttrain.cli, fasttrain.commands.supervise; print('torch' in sys.modules, 'deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", seen], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


@pytest.mark.parametrize(
    ("line", "training"),
    [
        ("python -u -m fasttrain --local_rank=0 train run.yaml", True),
        ("/usr/bin/python3.11 /venv/bin/fasttrain train run.yaml", True),
        ("fasttrain train run.yaml a=1", True),
        ("python -m fasttrain supervise -- python -m fasttrain train run.yaml", False),
        ("python -m fasttrain evaluate train", False),
        ("python /venv/bin/deepspeed --module fasttrain train run.yaml", False),
        ("python -u -m deepspeed.launcher.launch --module fasttrain train run.yaml", False),
        ("python /venv/bin/torchrun --nproc_per_node 2 -m fasttrain train run.yaml", False),
        ("bash -c fasttrain train", False),
        ("", False),
    ],
)
def test_what_counts_as_a_training(line: str, training: bool):
    assert is_training(line.split()) is training


@pytest.mark.parametrize(
    ("status", "told"), [(1, "ended with 1"), (137, "SIGKILL"), (138, "a process, node or link was lost"), (255, "ended with 255")]
)
def test_endings_in_words(status: int, told: str):
    assert told in ended(status)


def test_words_before_the_dashes_are_not_the_command():
    words: Sequence[str] = ["--", "deepspeed", "--", "x"]
    assert split_command(words) == ["deepspeed", "--", "x"]
