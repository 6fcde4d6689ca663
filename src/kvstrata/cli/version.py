"""``kvstrata version``."""

from __future__ import annotations

import platform

from kvstrata import plugins
from kvstrata.__about__ import __version__
from kvstrata.cli.output import AsJson, print_json

EXAMPLE = "Example: kvstrata version --json"


def version(as_json: AsJson = False) -> None:
    """Print the version and the tiers, codecs and policies there are."""
    groups: tuple[plugins.Group, ...] = ("tiers", "codecs", "policies")
    found = {group: plugins.names(group) for group in groups}
    if as_json:
        print_json({"version": __version__, "python": platform.python_version(), **found})
        return
    print(f"kvstrata {__version__} (Python {platform.python_version()})")
    for group, names in found.items():
        print(f"{group}: {', '.join(names)}")
