"""Files of JSON records, one a line: appended to, cut back at a resume, and never a reason for a run to end."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Lines:
    """A file that records are appended to. What a full disk does not take waits in memory for the next record.

    Args:
        path: half a line that a kill left at its end is cut away.

    Attributes:
        problem: what keeps records from being written, while something does.
    """

    def __init__(self, path: Path):
        self.problem: str | None = None
        self._waiting = b""
        path.touch()
        self._file = path.open("r+b", buffering=0)
        self._file.truncate(path.read_bytes().rfind(b"\n") + 1)
        self._file.seek(0, 2)

    def forget_after(self, step: int) -> None:
        """Takes away the records of later steps, which a resumed run takes again. In place: it needs no room on the disk."""
        self._file.seek(0)
        lines = self._file.readall().splitlines(keepends=True)
        kept = b"".join(line for line in lines if _step(line) <= step)
        self._file.seek(0)
        self._file.write(kept)
        self._file.truncate(len(kept))

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record. JSON knows no NaN: a non-finite number becomes its name."""
        self._waiting += json.dumps(jsonable(record)).encode() + b"\n"
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self.problem = None
        except OSError as error:
            self.problem = f"{error.strerror}"

    def close(self) -> None:
        self._file.close()


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of such a file, in their order; none where there is no file. Lines that are no record are left out."""
    if path.exists():
        for line in path.read_bytes().splitlines():
            if (record := _record(line)) is not None:
                yield record


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _step(line: bytes) -> float:
    record = _record(line)
    return math.inf if record is None else record["step"]


def jsonable(value: Any) -> Any:
    """Plain data as JSON knows it: a non-finite number becomes its name."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
