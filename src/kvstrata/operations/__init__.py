"""What an operator can see and do: operations on a running core, behind the HTTP API."""

from __future__ import annotations

from kvstrata.operations.operations import Operations

__all__ = ["Operations"]
