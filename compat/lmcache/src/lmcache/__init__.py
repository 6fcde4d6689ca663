"""The names of LMCache's package that vLLM, configurations and programs use, provided by kvstrata.

What is not here raises an ImportError that says so in one line.
"""

from __future__ import annotations

from kvstrata.__about__ import __version__ as _kvstrata_version
from kvstrata.config.lmcache import LMCACHE_VERSION
from kvstrata.distributions import lmcache_conflict
from kvstrata_lmcache.missing import explain_missing_modules, missing_names

if (_conflict := lmcache_conflict()) is not None:
    raise ImportError(_conflict)

__version__ = f"{LMCACHE_VERSION}+kvstrata.{_kvstrata_version}"
"""The version of LMCache whose names these are, and ours."""

__all__ = ["__version__"]
__getattr__ = missing_names(__name__)

explain_missing_modules(__name__)
