"""The device layer is torch's neighbour: without torch there is nothing to test."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="torch is not installed: make setup")
