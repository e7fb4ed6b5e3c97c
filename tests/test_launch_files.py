"""The launch files: Slurm's script beside stand-ins that start real tasks, Kubernetes' fields as its operator reads them.

Neither Slurm nor Kubernetes runs here: what is shown is the script's own logic, and that the fields are what they are meant to be.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.runs import plain_config, zero

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "configs" / "launch"
TIMEOUT = 60
MANY = 5000

# Two tasks as srun would start them; scancel signals them, and not srun; both say what they were called with.
SRUN = """
echo "$@" > srun-arguments
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 SLURM_STEP_ID=0 "$@" &
  tasks="$tasks $!"
done
echo $tasks > tasks
trap 'kill -KILL $tasks' TERM
status=0
for task in $tasks; do wait $task || status=$((status > $? ? status : $?)); done
exit $status
"""
SCANCEL = '[[ $1 == --signal=TERM && $2 == "$SLURM_JOB_ID" ]] && kill -TERM $(cat tasks)'
SCONTROL = """
case $1 in
  show) echo 127.0.0.1; echo another-host ;;
  requeue) echo "$2" > requeued ;;
esac
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch script, with stand-ins for Slurm's commands and for an installed `fasttrain`."""
    programs = {
        "srun": SRUN,
        "scancel": SCANCEL,
        "scontrol": SCONTROL,
        "fasttrain": f'exec {shlex.quote(sys.executable)} -m fasttrain "$@"',
    }
    (tmp_path / "bin").mkdir()
    for name, script in programs.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)
    plain = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return plain | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node-[0-1]",
    }


def batch(environment: dict[str, str], folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The batch script, as slurmd starts it."""
    script = ["bash", str(LAUNCH / "slurm.sh"), *arguments]
    return subprocess.Popen(script, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def stand_in(environment: dict[str, str], folder: Path, script: str) -> None:
    """Replaces what the tasks run: here only how they end matters."""
    path = folder / "bin" / "srun"
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")


def test_slurm_near_its_time_limit_all_tasks_save_and_the_job_goes_back_into_the_queue(slurm: dict[str, str], tmp_path: Path, digits: Path):
    run_dir, config = tmp_path / "run", tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(plain_config(run_dir, digits, deepspeed=zero(2), training={"steps": MANY})))
    job = batch(slurm, tmp_path, str(config), "log.every=2")
    deadline = time.monotonic() + TIMEOUT
    metrics = run_dir / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    output = job.communicate(timeout=TIMEOUT)[0]
    assert job.returncode == 143, output
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert f"stopped and saved at step {last} of {MANY}" in output
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == f"step-{last:08d}"
    assert (tmp_path / "requeued").read_text().strip() == slurm["SLURM_JOB_ID"]
    assert (tmp_path / "srun-arguments").read_text().split() == shlex.split(
        f"--kill-on-bad-exit=0 --wait=60 fasttrain train {config} log.every=2"
    )


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"), [(0, 0, False), (2, 0, False), (3, 0, False), (138, 0, True), (138, 10, False)]
)
def test_slurm_requeues_what_another_allocation_can_mend(status: int, restarts: int, requeued: bool, slurm: dict[str, str], tmp_path: Path):
    stand_in(slurm, tmp_path, f"exit {status}")
    (tmp_path / "bin" / "fasttrain").write_text('#!/usr/bin/env bash\nwhile [[ $1 != -- ]]; do shift; done; shift; exec "$@"\n')
    job = batch({**slurm, "SLURM_RESTART_COUNT": str(restarts)}, tmp_path, "run.yaml")
    assert job.wait(TIMEOUT) == status
    assert (tmp_path / "requeued").exists() is requeued


def test_slurm_cancelled_the_job_stays_out_of_the_queue(slurm: dict[str, str], tmp_path: Path):
    stand_in(slurm, tmp_path, "echo > up; while [[ ! -e asked ]]; do sleep 0.1; done; exit 143")
    (tmp_path / "bin" / "scancel").write_text("#!/usr/bin/env bash\necho > asked\n")
    job = batch(slurm, tmp_path, "run.yaml")
    while not (tmp_path / "up").exists():
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.05)
    job.terminate()
    assert job.wait(TIMEOUT) == 143
    assert not (tmp_path / "requeued").exists()


def job() -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())


def test_kubernetes_has_the_fields_that_a_pytorchjob_wants():
    spec = job()["spec"]
    assert (job()["apiVersion"], job()["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert set(spec) == {"runPolicy", "pytorchReplicaSpecs"}
    assert set(spec["runPolicy"]) <= {"cleanPodPolicy", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit", "suspend"}
    assert set(spec["pytorchReplicaSpecs"]) == {"Master", "Worker"}
    assert spec["pytorchReplicaSpecs"]["Master"]["replicas"] == 1
    for replicas in spec["pytorchReplicaSpecs"].values():
        assert set(replicas) == {"replicas", "restartPolicy", "template"}
        assert replicas["restartPolicy"] == "ExitCode"
        [container] = replicas["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        assert container["ports"][0]["name"] == "pytorchjob-port"


def test_kubernetes_each_pod_starts_deepspeed_with_its_own_number(tmp_path: Path):
    """The pod's shell command, with a stand-in that says what it was started with."""
    [script] = job()["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]["args"]
    said = tmp_path / "fasttrain"
    said.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    said.chmod(0o755)
    operator = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "m-0", "MASTER_PORT": "23456"}
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path), **operator}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    words = done.stdout.split()
    assert Path(words[words.index("--hostfile") + 1]).read_text() == "pod-0 slots=8\npod-1 slots=8\n"
    assert words[:3] == ["supervise", "--", "deepspeed"]
    assert words[words.index("--node_rank") + 1] == "1"
    assert words[words.index("--master_addr") + 1] == "m-0"
    assert (ROOT / words[-1]).is_file()
