from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from kvstrata.client import LocalClient
from kvstrata.config import Settings
from kvstrata.testing.client import ClientContract, Start


class TestLocalClient(ClientContract):
    @pytest.fixture
    def start(self, with_plugin: None) -> Iterator[Start]:
        with contextlib.ExitStack() as stack:

            def start(settings: Settings) -> LocalClient:
                return stack.enter_context(LocalClient(settings))

            yield start
