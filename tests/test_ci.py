"""The continuous integration's own script, on stand-ins for the slow tools that it starts."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]

PYTHON = """#!/bin/sh
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip") ;;
    "-c "*)
        sleep 60 &
        echo $! >"$MADE/building" && mv "$MADE/building" "$MADE/compiler"
        wait ;;
    *)
        while [ ! -e "$MADE/compiler" ]; do sleep 0.01; done
        exit 1 ;;
esac
"""


def test_a_build_that_nobody_waits_for_ends_before_its_environment_goes(tmp_path: Path):
    (tmp_path / "scratch").mkdir()
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    surroundings = {**os.environ, "PYTHON": str(python), "MADE": str(tmp_path), "TMPDIR": str(tmp_path / "scratch")}
    done = subprocess.run([ROOT / ".ci" / "run"], env=surroundings, capture_output=True, text=True, timeout=50, check=False)
    compiler = Path("/proc") / (tmp_path / "compiler").read_text().strip() / "cmdline"
    assert done.returncode != 0 and not (compiler.exists() and b"sleep" in compiler.read_bytes()), done.stderr
    assert not list((tmp_path / "scratch").iterdir())
