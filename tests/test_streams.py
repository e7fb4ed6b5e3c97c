"""Output whose reader goes, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import sys
from pathlib import Path
from rich.console import Console
from fasttrain.streams import outlive_reader
outlive_reader()
print("up", flush=True)
sys.stdin.readline()  # until the reader has gone
for _ in range(3):
    {line}
Path("done").touch()
"""


@pytest.mark.parametrize("line", ["print('x' * 10_000, flush=True)", "Console().print('x')", "print('x', file=sys.stderr)", "print('x')"])
def test_lines_that_nobody_reads_end_nothing(line: str, tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT.format(line=line)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin and process.stdout and process.stderr
        assert process.stdout.readline() == "up\n"
        process.stdout.close()
        process.stderr.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert process.wait(20) == 0
    assert (tmp_path / "done").exists()


def test_read_output_is_all_there():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import fasttrain.streams as s; s.outlive_reader(); print('out'); import sys; print('err', file=sys.stderr)",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "err\n")
