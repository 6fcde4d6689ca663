"""Words for what LMCache's package has and this one has not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn

_ADVICE = "is not provided by kvstrata-lmcache; see kvstrata's docs/migrate-from-lmcache.md"


def missing_names(module: str) -> Callable[[str], NoReturn]:
    """A ``__getattr__`` for ``module``: an ImportError for names that programs import, as usual for the others."""

    def refuse(name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        raise ImportError(f"{module}.{name} {_ADVICE}", name=module)

    return refuse


def explain_missing_modules(package: str) -> None:
    """Let the import of modules below ``package`` that do not exist say so. Idempotent."""
    if not any(isinstance(finder, _LastFinder) for finder in sys.meta_path):
        sys.meta_path.append(_LastFinder(package))


class _LastFinder:
    """Asked when all other finders have found nothing."""

    def __init__(self, package: str) -> None:
        self._prefix = f"{package}."

    def find_spec(self, name: str, *_: object) -> None:
        """Nothing, for modules of others.

        Raises:
            ModuleNotFoundError: the module would be below the package.
        """
        if name.startswith(self._prefix):
            raise ModuleNotFoundError(f"{name} {_ADVICE}", name=name)


class Unused:
    """In the place of classes that modules of vLLM import, and do not use while the connector is ours."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise ImportError(f"LMCache's own client {_ADVICE}")
