"""Which TRL the adapter was written against; another may hold the same names with another meaning."""

from __future__ import annotations

from importlib import metadata

from kldiv_kernels.extras import not_installed

_LAST = (1, 16)


def require(what: str, first: tuple[int, int] = (1, 14)) -> None:
    """Raises ImportError where TRL is missing, or is older than `first` or newer than 1.16; `what` names the caller."""
    allowed = f"TRL {_text(first)} to {_text(_LAST)}"
    try:
        found = metadata.version("trl")
    except metadata.PackageNotFoundError:
        raise ModuleNotFoundError(not_installed(what, "trl"), name="trl") from None
    major, minor, *_ = found.split(".")
    # A development version is what comes before its number, and may be anything.
    if "dev" in found or not first <= (int(major), int(minor)) <= _LAST:
        raise ImportError(f"{what}: TRL is {found}; expected {allowed} (pip install trl==1.16.0)")


def _text(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
