"""Versions of installed packages, by their metadata: nothing is imported."""

from importlib.metadata import PackageNotFoundError, version


def installed(distribution: str) -> str | None:
    """The version of a distribution; None where it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
