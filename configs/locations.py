"""Where prepared data may lie: a local folder, or a folder on a web server or an S3 store. Never a command."""

from __future__ import annotations

import re

from .errors import UsageError

REMOTE_SCHEMES = ("http", "https", "s3")

# Two letters at least, so that a drive such as C: stays a path.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")


def scheme_of(location: str) -> str:
    """The scheme of a URL in lower case, or an empty string for a path."""
    found = _SCHEME.match(location)
    return found[1].lower() if found else ""


def is_remote(location: str) -> bool:
    """Whether ``location`` is read over a network. It must have passed ``check_location``."""
    return scheme_of(location) in REMOTE_SCHEMES


def check_location(name: str, location: str) -> None:
    """Raise UsageError unless ``location``, the value of ``name``, is a path or a URL of a scheme that is read."""
    scheme = scheme_of(location)
    if scheme == "pipe":
        raise UsageError(
            f"{name}={location} would run a command, and data are never read through one: "
            "give a folder, or an http(s):// or s3:// URL"
        )
    if scheme and not location.startswith(tuple(f"{known}://" for known in REMOTE_SCHEMES)):
        raise UsageError(
            f"{name}={location} is no place that data are read from: give a folder (with ./ before a name that "
            "holds a colon), or an http://, https:// or s3:// URL"
        )
