"""What a command tells where it cannot write what was asked for."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fasttrain.errors import UserError


@contextmanager
def writing_to(out: Path, kind: str = "folder") -> Iterator[None]:
    """Around all that writes to `--out`, a "folder" or "file".

    Raises:
        UserError: it cannot be written to.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there: {error.strerror}; make room or choose another {kind}") from None


def try_file(out: Path) -> None:
    """Raises UserError, before what takes long, where the file that comes of it cannot be written; makes the folder for it."""
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; give the name of a file")
    with writing_to(out, "file"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out.parent) as probe:
            probe.write(bytes(1 << 12))
