"""Which distributions are installed in this Python, as far as somebody here has to know."""

from __future__ import annotations

from importlib import metadata

DROP_IN = "kvstrata-lmcache"
"""The distribution that provides the package ``lmcache`` in our name (compat/lmcache)."""
_LMCACHE = ("lmcache", "lmcache-cli")
"""The distributions of LMCache that have that package."""


def installed_version(distribution: str) -> str | None:
    """The version of ``distribution``; None when it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def lmcache_conflict() -> str | None:
    """One line when LMCache and our drop-in are both installed, whose files overwrite each other; else None."""
    drop_in = installed_version(DROP_IN)
    for name in _LMCACHE if drop_in is not None else ():
        version = installed_version(name)
        if version is not None:
            return (
                f"{name} {version} and {DROP_IN} {drop_in} are both installed and overwrite each other's files: "
                f"'pip uninstall {name} {DROP_IN}', then install the one that is wanted"
            )
    return None
