"""The guard, beside real processes that stop, hang or work on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
LIMIT, WAKING, MARGIN = 1.0, 0.5, 5.0
GUARDED = f"""
import sys, threading, time
from fasttrain.engine.guard import Guard
guard = Guard({LIMIT}, {WAKING})
print("guarded", flush=True)
{{what}}
"""
WORKS = "while True: guard.beat(); time.sleep(0.1)"
HANGS = "time.sleep(60)"


def start(what: str) -> tuple[subprocess.Popen[str], psutil.Process]:
    """A process that does this under a guard, and its guard."""
    command = [sys.executable, "-c", GUARDED.format(what=what)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "guarded\n"
    [guard] = psutil.Process(process.pid).children()
    return process, guard


def status(process: psutil.Process) -> str:
    return process.status() if process.is_running() else "gone"


def test_the_guard_ends_with_its_process_and_at_no_launchers_signal():
    process, guard = start(WORKS)
    time.sleep(0.3)
    guard.send_signal(signal.SIGTERM)
    guard.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert guard.is_running()
    process.kill()
    process.wait()
    psutil.wait_procs([guard], timeout=MARGIN)
    assert not guard.is_running()


def test_a_process_that_hangs_is_killed_after_the_limit():
    began = time.monotonic()
    process, guard = start(HANGS)
    assert process.wait(LIMIT + WAKING + MARGIN) == -signal.SIGKILL
    assert time.monotonic() - began > LIMIT + WAKING
    psutil.wait_procs([guard], timeout=MARGIN)
    assert not guard.is_running()


def test_a_stopped_process_is_woken_and_left_alone_when_it_beats_again():
    process, guard = start(WORKS)
    process.send_signal(signal.SIGSTOP)
    time.sleep(LIMIT / 2)
    assert psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
    deadline = time.monotonic() + LIMIT + MARGIN
    while psutil.Process(process.pid).status() == psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(LIMIT + WAKING + 1)
    assert process.poll() is None
    assert guard.is_running()
    process.kill()
    process.wait()


def test_stopped_together_as_by_ctrl_z_is_no_silence():
    process, guard = start(WORKS)
    for stopped in (guard, psutil.Process(process.pid)):
        stopped.suspend()
    time.sleep(LIMIT + WAKING + 1)
    for stopped in (guard, psutil.Process(process.pid)):
        stopped.resume()
    time.sleep(1)
    assert process.poll() is None
    process.kill()
    process.wait()


def test_closed_it_is_gone():
    process, guard = start("time.sleep(0.5); guard.close(); time.sleep(60)")
    psutil.wait_procs([guard], timeout=MARGIN)
    assert status(guard) in ("gone", psutil.STATUS_ZOMBIE)
    process.kill()
    process.wait()
