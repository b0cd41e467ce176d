"""Locations: a path, or a URL of a scheme that is read; never a command."""

from __future__ import annotations

import pytest

from trine.configs.errors import UsageError
from trine.configs.locations import check_location, is_remote, scheme_of

LOCAL = [
    "data/web",
    "/data/web",
    "../web",
    "web",
    "C:",
    r"C:\data\web",
    "C:/data/web",
    "./a:b",
    "./pipe:cat",
    "data/pipe:cat",
    "/data/s3://bucket",
    "2024:web",
    "\u00fcber:web",
]
REMOTE = {"http://host/web": "http", "https://host:8080/web": "https", "s3://bucket/web": "s3"}
COMMANDS = ["pipe:cat x.tar", "PIPE:cat x.tar", "Pipe://cat", "pipe:"]
OTHERS = [
    "ftp://host/web",
    "file:///data/web",
    "gs://bucket/web",
    "a-b.c+d:web",
    "s3:bucket",
    "http:/host",
    "HTTPS:web",
]


@pytest.mark.parametrize("location", LOCAL)
def test_paths_are_local(location: str) -> None:
    check_location("data.directory", location)
    assert scheme_of(location) == ""
    assert not is_remote(location)


@pytest.mark.parametrize("location", REMOTE)
def test_urls_are_remote(location: str) -> None:
    check_location("data.directory", location)
    assert scheme_of(location) == REMOTE[location]
    assert is_remote(location)


@pytest.mark.parametrize("location", COMMANDS)
def test_commands_are_refused_as_such(location: str) -> None:
    assert scheme_of(location) == "pipe"
    with pytest.raises(UsageError) as raised:
        check_location("data.sources.3.directory", location)
    assert str(raised.value) == (
        f"data.sources.3.directory={location} would run a command, and data are never read through one: "
        "give a folder, or an http(s):// or s3:// URL"
    )


@pytest.mark.parametrize("location", OTHERS)
def test_other_schemes_are_refused(location: str) -> None:
    with pytest.raises(UsageError) as raised:
        check_location("data.directory", location)
    assert str(raised.value) == (
        f"data.directory={location} is no place that data are read from: give a folder (with ./ before a name that "
        "holds a colon), or an http://, https:// or s3:// URL"
    )
