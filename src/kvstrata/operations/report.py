"""What operations answer with."""

from __future__ import annotations

from typing import ClassVar


class Report:
    """Base of the frozen dataclasses that travel to the HTTP API, which makes its documentation from them."""

    __pydantic_config__: ClassVar[dict[str, bool]] = {"use_attribute_docstrings": True}
