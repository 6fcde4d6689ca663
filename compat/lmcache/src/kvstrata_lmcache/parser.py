"""How arguments are refused."""

from __future__ import annotations

import argparse
from typing import NoReturn

USAGE = 2
"""Exit status of wrong usage, as everywhere in kvstrata."""


class OneLineParser(argparse.ArgumentParser):
    """Ends with one line, and without a page of usage, when it does not understand."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and leave."""
        self.exit(USAGE, f"{self.prog}: {message}\n")
