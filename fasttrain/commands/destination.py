"""What a command tells where it cannot write what was asked for."""

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
