"""Two hosts on one machine, where they can be made; and what is made of a run on them."""

import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks import hosts
from benchmarks.hosts import missing, two_hosts
from benchmarks.two_host_runs import config, same_bits
from benchmarks.two_host_table import told
from benchmarks.two_hosts import as_promised
from fasttrain.config import parse_config

AS_PROMISED: dict[str, Any] = {
    "limit_seconds": 20.0,
    "ranks_ended_seconds": {"0": 15.94, "1": 0.02},
    "restarted_seconds": 26.0,
    "left_at_restart": [],
    "left_at_end": [],
    "in_time": True,
    "verdicts": [{"cause": "died", "ranks": [1], "told": "rank 1 has died"}],
    "stacks": ["faults/0001/rank-00000.txt"],
    "same_loss": True,
    "same_bits": True,
}


def test_two_hosts_reach_each_other_until_the_link_is_cut_and_leave_nothing(tmp_path: Path):
    if lacking := missing():
        pytest.skip(lacking)
    with two_hosts(tmp_path) as (first, second):
        asked = ["ssh", second.name, "hostname"]
        assert first.start(asked, stdout=subprocess.PIPE).communicate()[0] == "host-b\n"
        left = second.start(["sleep", "60"])
        second.set_link(up=False)
        assert first.start(asked, stderr=subprocess.DEVNULL).wait() != 0
    assert not psutil.pid_exists(left.pid)
    spaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert first.namespace not in spaces
    assert second.namespace not in spaces


def test_a_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hosts.os, "geteuid", lambda: 0)
    monkeypatch.setattr(hosts, "_program", lambda name: None if name in ("sshd", "pdsh") else name)
    assert missing() == "needs the Debian packages openssh-server, pdsh"
    monkeypatch.setattr(hosts.os, "geteuid", lambda: 1000)
    assert missing() == "needs root, to make network namespaces"


def test_the_runs_config_is_a_config(tmp_path: Path):
    assert parse_config(config(tmp_path / "run", tmp_path / "digits", 15.0), "here").zero_stage == 2


@pytest.mark.parametrize(
    "change",
    [
        {"in_time": False},
        {"left_at_restart": ["python"]},
        {"left_at_end": ["python"]},
        {"same_bits": False},
        {"same_loss": False},
        {"failed": "not within 150 s"},
    ],
)
def test_a_promise_broken_is_told(change: dict[str, Any]):
    assert as_promised(AS_PROMISED)
    assert not as_promised({**AS_PROMISED, **change})
    assert "**" in told({"faults": {"link cut": {**AS_PROMISED, **change}}})


def test_the_table_says_what_happened():
    row = told({"faults": {"worker stopped": AS_PROMISED}}).splitlines()[-1]
    assert row.startswith("| worker stopped | 15.9 s, 0.0 s (ranks 0, 1) | 20 s | rank 1; stacks of 1 | 0 | 26.0 s | bit for bit")


def test_states_are_compared_bit_for_bit():
    one = {"master": {"weight": torch.tensor([1.0, 2.0])}}
    assert same_bits(one, {"master": {"weight": torch.tensor([1.0, 2.0])}})
    assert not same_bits(one, {"master": {"weight": torch.tensor([1.0, 2.0 + 2e-7])}})
    assert not same_bits(one, {"master": {}})
