"""What operations answer with."""

from __future__ import annotations

import sys
from typing import ClassVar

DOCSTRINGS_ARE_READ = sys.version_info >= (3, 12, 2) or (3, 11, 8) <= sys.version_info < (3, 12)
"""Whether docstrings of fields may be read from their source. Before, parsing could fail while another
thread parsed too, as logging a traceback does: https://github.com/python/cpython/issues/106905"""


class Report:
    """Base of the frozen dataclasses that travel to the HTTP API, which makes its documentation from them."""

    __pydantic_config__: ClassVar[dict[str, bool]] = {"use_attribute_docstrings": DOCSTRINGS_ARE_READ}
