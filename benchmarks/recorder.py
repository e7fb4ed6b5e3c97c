"""A pytest plugin: keeps every outcome in a JSON file while the tests run, and ends the run cleanly when its time is up.

    python -m pytest -p benchmarks.recorder --record FILE --record-part NAME --record-seconds 300 ...

Several runs may share a file, each its own part. Under xdist the process that hands out the tests does the recording.
"""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.whole_file import write_json

WRITE_EVERY = 2.0
"""Seconds between writes: a test that takes milliseconds should not wait for the disk."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("record")
    group.addoption("--record", type=Path, help="the JSON file")
    group.addoption("--record-part", default="tests", help="the name of this run within the file")
    group.addoption("--record-seconds", type=float, default=float("inf"), help="no test starts after this many seconds")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(config), "benchmarks-recorder")


class Recorder:
    """Counts outcomes, keeps failures and the reasons of skips."""

    def __init__(self, config: pytest.Config):
        self._path: Path = config.getoption("--record")
        self._part: str = config.getoption("--record-part")
        self._seconds: float = config.getoption("--record-seconds")
        self._start = self._written = time.monotonic()
        self._session: pytest.Session | None = None
        self._outcomes: Counter[str] = Counter()
        self._skips: Counter[str] = Counter()
        self._failures: list[dict[str, str]] = []
        self._collected = 0
        self._stopped = False

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self._session = session
        self._write(complete=False)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._collected = max(self._collected, len(session.items))

    @pytest.hookimpl(optionalhook=True)  # xdist's own, which need not be installed
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self._collected = max(self._collected, len(ids))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._outcomes[report.outcome if report.when == "call" or report.outcome == "skipped" else "error"] += 1
        if report.skipped and isinstance(report.longrepr, tuple):
            self._skips[report.longrepr[2].removeprefix("Skipped: ")] += 1
        if report.failed:
            self._failures.append({"name": report.nodeid, "message": str(report.longrepr)[-1500:]})
        now = time.monotonic()
        if now - self._start > self._seconds and not self._stopped:
            self._stop()
        if now - self._written > WRITE_EVERY:
            self._write(complete=False)

    def pytest_sessionfinish(self) -> None:
        self._write(complete=not self._stopped)

    def _stop(self) -> None:
        self._stopped = True
        assert self._session is not None
        # Under xdist the one who deals out the tests listens to its own flag.
        dealer = self._session.config.pluginmanager.getplugin("dsession") or self._session
        dealer.shouldstop = f"{self._seconds:.0f} seconds are up"

    def _write(self, complete: bool) -> None:
        self._written = time.monotonic()
        done = sum(self._outcomes.values())
        found = json.loads(self._path.read_text()) if self._path.exists() else {"benchmark": "tests", "parts": {}}
        found["parts"][self._part] = {
            "outcomes": dict(self._outcomes),
            "not_run": max(0, self._collected - done),
            "complete": complete,
            "seconds": round(self._written - self._start, 1),
            "skipped": dict(self._skips),
            "failures": self._failures[:50],
        }
        write_json(self._path, found)
