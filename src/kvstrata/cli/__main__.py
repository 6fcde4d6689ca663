"""``python -m kvstrata.cli``: the command ``kvstrata``."""

from __future__ import annotations

import sys

from kvstrata.cli.main import main

sys.exit(main())
