"""Credentials from the shared file of AWS' own tools, which the client library does not read."""

from __future__ import annotations

import configparser
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from kvstrata.errors import TierUnavailable

if TYPE_CHECKING:
    from obstore.store import S3Credential

REREAD = timedelta(minutes=5)
"""How long what was read is used: tools that rotate keys write the file anew."""
FIRST = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
)
"""What goes before the file; the client library reads these itself."""


def profile_credentials() -> Callable[[], S3Credential] | None:
    """What reads the keys of the profile; None where the client library's own chain has them.

    The profile is ``AWS_PROFILE``, else ``default``; the file ``AWS_SHARED_CREDENTIALS_FILE``, else
    ``~/.aws/credentials``.
    """
    profile = os.environ.get("AWS_PROFILE", "default")
    path = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials").expanduser()
    if any(os.environ.get(name) for name in FIRST):
        return None
    if "AWS_PROFILE" not in os.environ and not _read(path).has_option(profile, "aws_access_key_id"):
        return None

    def provide() -> S3Credential:
        file = _read(path)
        if not file.has_option(profile, "aws_access_key_id"):
            raise TierUnavailable(f"profile {profile!r} has no aws_access_key_id in {path}")
        return {
            "access_key_id": file.get(profile, "aws_access_key_id"),
            "secret_access_key": file.get(profile, "aws_secret_access_key", fallback=""),
            "token": file.get(profile, "aws_session_token", fallback=None),
            "expires_at": datetime.now(UTC) + REREAD,
        }

    return provide


def _read(path: Path) -> configparser.ConfigParser:
    """The file; empty when it is not there or not such a file."""
    file = configparser.ConfigParser(interpolation=None)
    try:
        file.read(path, encoding="utf-8")
    except (configparser.Error, OSError, UnicodeDecodeError):
        return configparser.ConfigParser(interpolation=None)
    return file
