"""Prepared data behind a URL: the samples of the local folder, each member fetched once, and no silent failure."""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import resource
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from trine.configs.errors import RunError, UsageError
from trine.data_pipeline.dataset import TokenDataset
from trine.data_pipeline.shards.manifest import MANIFEST, UNFINISHED, load_manifest
from trine.data_pipeline.shards.member_index import Member, parse_index
from trine.data_pipeline.shards.open_shards import OPEN_SHARDS
from trine.data_pipeline.shards.reader import Damage
from trine.data_pipeline.storage import http_store, patience
from trine.data_pipeline.storage.folder import open_folder
from trine.data_pipeline.storage.shard_cache import RANGES_SUFFIX, CachedFile, Ranges, default_cache

SPLIT = "validation"
"""8 shards of one member. Those of the other split have up to two."""
LENGTH = 50


Lie = Callable[[bytes, str], tuple[bytes, str]]
"""From the bytes and the Content-Range of an answer to those that are sent."""


class WebServer(ThreadingHTTPServer):
    """A web server on loopback that notes what it was asked for."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranges = True
        self.failures: list[int] = []
        """Statuses with which the next requests are answered."""
        self.lies: list[Lie] = []
        """What becomes of the next answers to range requests."""
        self.lengths = True
        """Whether it says how long files are."""
        self.elsewhere = ""
        """Folder to which every request is redirected."""
        self.authorizations: set[str | None] = set()
        self.log: list[tuple[str, str, int]] = []
        """Method, file, and bytes sent of it."""
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        thread.start()
        yield
        self.shutdown()
        thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def sent(self, suffix: str) -> list[int]:
        return [count for method, name, count in self.log if method == "GET" and name.endswith(suffix)]


class Handler(SimpleHTTPRequestHandler):
    """Files with support of one range per request, as web servers have it."""

    protocol_version = "HTTP/1.1"
    server: WebServer

    def do_GET(self) -> None:
        self.respond("GET")

    def do_HEAD(self) -> None:
        self.respond("HEAD")

    def respond(self, method: str) -> None:
        self.server.authorizations.add(self.headers.get("Authorization"))
        path = Path(self.translate_path(self.path))
        if self.server.failures:
            self.answer(self.server.failures.pop(0), b"")
        elif self.server.elsewhere:
            self.answer(302, b"", location=f"{self.server.elsewhere}/{path.name}")
        elif not path.is_file():
            self.answer(404, b"")
        else:
            data = path.read_bytes()
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if not wanted or not self.server.ranges:
                self.answer(200, data, method)
            elif int(wanted[1]) >= len(data):
                self.answer(416, b"")
            else:
                part = data[int(wanted[1]) : int(wanted[2]) + 1]
                content_range = f"bytes {wanted[1]}-{int(wanted[1]) + len(part) - 1}/{len(data)}"
                if self.server.lies:
                    part, content_range = self.server.lies.pop(0)(part, content_range)
                self.answer(206, part, method, content_range=content_range)

    def answer(self, status: int, data: bytes, method: str = "GET", **headers: str) -> None:
        self.server.log.append((method, self.path.rsplit("/", 1)[-1], len(data)))
        self.send_response(status)
        if method == "GET" or self.server.lengths:
            self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if method == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the tests read ``WebServer.log``."""


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def web(prepared: Path, tmp_path: Path) -> Iterator[WebServer]:
    """A server of a copy of the prepared corpus, which a test may damage."""
    with WebServer(shutil.copytree(prepared, tmp_path / "served")) as server, server.running():
        yield server


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter pauses between attempts, and no proxy for loopback."""
    monkeypatch.setattr(patience, "PAUSES", (0.01, 0.01))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


def assert_equal(found: TokenDataset, expected: TokenDataset) -> None:
    assert len(found) == len(expected)
    for g in range(len(expected)):
        np.testing.assert_array_equal(found[g].tokens, expected[g].tokens)
        np.testing.assert_array_equal(found[g].document_starts, expected[g].document_starts)


def first_shard(folder: Path) -> Path:
    return folder / load_manifest(folder).splits[SPLIT][0].name


def members_of(shard: Path) -> list[Member]:
    return [Member(*row.tolist()) for row in parse_index(shard.with_suffix(".idx.npy").read_bytes())]


def shard_of_two_members(folder: Path) -> tuple[Path, int]:
    """The shard of the training split with two members of which the first is the largest, and its first token."""
    records = load_manifest(folder).splits["train"]
    sizes = [[member.tokens for member in members_of(folder / record.name)] for record in records]
    number = max(range(len(records)), key=lambda n: sizes[n][0] if len(sizes[n]) == 2 else 0)
    assert sizes[number][0] > 3 * LENGTH
    return folder / records[number].name, sum(record.tokens for record in records[:number])


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_a_web_server_gives_the_local_samples_and_every_byte_once(web: WebServer, cache: Path) -> None:
    dataset = TokenDataset(f"{web.url}/", SPLIT, LENGTH, cache=cache)
    assert [name for _, name, _ in web.log] == [MANIFEST]  # opening touches no shard
    assert_equal(dataset, TokenDataset(web.folder, SPLIT, LENGTH))
    records = dataset.manifest.splits[SPLIT]
    assert sum(web.sent(".tar")) <= sum(record.bytes for record in records)
    assert len(web.sent(".tar")) <= sum(len(members_of(web.folder / record.name)) for record in records)
    assert len(web.sent(".idx.npy")) == len(records)


def test_one_sample_takes_the_members_that_it_touches_in_one_request(web: WebServer, cache: Path) -> None:
    dataset = TokenDataset(web.url, "train", LENGTH, cache=cache)
    shard, start = shard_of_two_members(web.folder)
    first, second = members_of(shard)
    g = (start + first.tokens) // LENGTH
    assert start < g * LENGTH < start + first.tokens <= (g + 1) * LENGTH
    dataset[g]
    assert web.sent(shard.name) == [second.end - first.offset]


def adding(data: bytes, content_range: str) -> tuple[bytes, str]:
    return data + b"more", content_range


LIES: dict[str, tuple[Lie, str]] = {
    "more than was asked for": (adding, r"the server sent more than the \d+ bytes that were to come"),
    "less than is announced": (lambda data, said: (data[:-1], said), r"the server sent \d+ bytes and announced \d+"),
    "another part": (
        lambda data, said: (data, said.replace("bytes ", "bytes 1")),
        r"the server was asked for bytes \d+-\d+ and sent 'bytes 1\d+-\d+/\d+'",
    ),
    "a longer part": (
        lambda data, said: (data + b"more", re.sub(r"-(\d+)", lambda last: f"-{int(last[1]) + 4}", said)),
        r"the server was asked for bytes \d+-\d+ and sent 'bytes ",
    ),
    "less than the file has": (
        lambda data, said: (data[:-1], re.sub(r"-(\d+)", lambda last: f"-{int(last[1]) - 1}", said)),
        r"the server was asked for bytes \d+-\d+ and sent 'bytes ",
    ),
    "no part": (lambda data, said: (data, ""), r"the server was asked for bytes \d+-\d+ and sent ''"),
    "an empty part": (lambda data, said: (b"", "bytes 512-511/*"), r"the server was asked for bytes \d+-\d+ and sent 'bytes 512-511/\*'"),
}


@pytest.mark.parametrize("name", LIES)
def test_an_answer_that_is_not_what_was_asked_for_is_no_answer(web: WebServer, cache: Path, name: str) -> None:
    lie, complaint = LIES[name]
    dataset = TokenDataset(web.url, SPLIT, LENGTH, cache=cache)
    web.lies = [lie] * 3
    with pytest.raises(RunError, match=rf"{web.url}/validation-.*\.tar cannot be read \({complaint}.*, 3 att") as error:
        dataset[0]
    assert not isinstance(error.value, Damage)
    web.lies = [lie] * 2
    np.testing.assert_array_equal(dataset[0].tokens, TokenDataset(web.folder, SPLIT, LENGTH)[0].tokens)


def test_an_over_long_answer_leaves_alone_what_was_verified(web: WebServer, cache: Path) -> None:
    dataset = TokenDataset(web.url, "train", LENGTH, cache=cache)
    shard, start = shard_of_two_members(web.folder)
    before, behind = start // LENGTH + 1, (start + members_of(shard)[0].tokens) // LENGTH + 1
    expected = dataset[behind].tokens
    # As much as the answer was to have, and more than lies between the members.
    web.lies = [lambda data, said: (data + b"\1" * 3000, said)] * 3
    with pytest.raises(RunError, match="the server sent more than"):
        dataset[before]
    np.testing.assert_array_equal(dataset[behind].tokens, expected)


class Overtaken:
    """A source whose bytes are wrong, and arrive after another process has kept the right ones."""

    def __init__(self, other: CachedFile) -> None:
        self.size, self.other = other.size, other

    def read(self, offset: int, count: int, *, fresh: bool = False) -> NDArray[np.uint8]:
        self.other.read(offset + 1, count - 2)
        return np.full(count, 7, np.uint8)


def test_what_was_kept_meanwhile_is_not_written_again(tmp_path: Path) -> None:
    (tmp_path / "right").write_bytes(b"abcdefgh")
    right = open_folder(tmp_path).open("right", 8)
    slow = CachedFile(Overtaken(CachedFile(right, tmp_path / "kept")), tmp_path / "kept")
    assert slow.read(2, 4).tobytes() == b"\7de\7"
    assert slow.read(2, 4, fresh=True).tobytes() == b"\7\7\7\7"
    assert CachedFile(right, tmp_path / "kept").read(0, 1 << 60).tobytes() == b"ab\7\7\7\7gh"


def test_a_file_without_end_does_not_fill_the_memory(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_store, "_LARGEST_WHOLE", 100)
    with pytest.raises(RunError, match=rf"{web.url}/index\.json cannot be read \(the server sent more than the 100 bytes"):
        load_manifest(web.url)


def test_another_success_is_none(web: WebServer) -> None:
    web.failures = [204] * 3
    with pytest.raises(RunError, match="the server answered with HTTP status 204 instead of 200, 3 attempts"):
        load_manifest(web.url)


def test_a_second_dataset_reads_the_cache_alone(web: WebServer, cache: Path) -> None:
    assert_equal(TokenDataset(web.url, SPLIT, LENGTH, cache=cache), TokenDataset(web.folder, SPLIT, LENGTH))
    web.log.clear()
    again = TokenDataset(web.url, SPLIT, LENGTH, cache=cache)
    assert_equal(again, TokenDataset(web.folder, SPLIT, LENGTH))
    assert [name for _, name, _ in web.log] == [MANIFEST]


def test_a_shard_that_was_closed_is_not_fetched_again(
    web: WebServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OPEN_SHARDS, "limit", 1)
    dataset = TokenDataset(web.url, SPLIT, LENGTH, cache=cache)
    assert_equal(dataset, TokenDataset(web.folder, SPLIT, LENGTH))
    requests = len(web.log)
    assert_equal(dataset, TokenDataset(web.folder, SPLIT, LENGTH))
    assert len(web.log) == requests


def test_threads_fetch_every_byte_once(web: WebServer, cache: Path) -> None:
    dataset, local = TokenDataset(web.url, SPLIT, LENGTH, cache=cache), TokenDataset(web.folder, SPLIT, LENGTH)
    ids = np.random.default_rng(0).integers(0, len(local), 3 * len(local))
    with ThreadPoolExecutor(16) as threads:
        for g, sample in zip(ids, threads.map(dataset.__getitem__, ids), strict=True):
            np.testing.assert_array_equal(sample.tokens, local[g].tokens)
    assert sum(web.sent(".tar")) <= sum(record.bytes for record in local.manifest.splits[SPLIT])
    assert len(web.sent(".idx.npy")) == len(local.manifest.splits[SPLIT])


def test_processes_share_a_cache(web: WebServer, cache: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from trine.data_pipeline.dataset import TokenDataset\n"
        f"dataset = TokenDataset(sys.argv[1], '{SPLIT}', {LENGTH}, cache=Path(sys.argv[2]))\n"
        "print(*(int(dataset[g].tokens.sum()) for g in range(len(dataset))))"
    )
    command = [sys.executable, "-c", script, web.url, str(cache)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    local = TokenDataset(web.folder, SPLIT, LENGTH)
    expected = [int(local[g].tokens.sum()) for g in range(len(local))]
    assert [list(map(int, output.split())) for output in outputs] == [expected, expected]
    assert_equal(TokenDataset(web.url, SPLIT, LENGTH, cache=cache), local)


def test_what_another_process_fetched_meanwhile_is_not_fetched(web: WebServer, cache: Path) -> None:
    first, second = (TokenDataset(web.url, SPLIT, LENGTH, cache=cache) for _ in range(2))
    first[0], second[0]
    assert_equal(first, TokenDataset(web.folder, SPLIT, LENGTH))
    sent = len(web.sent(".tar"))
    assert_equal(second, TokenDataset(web.folder, SPLIT, LENGTH))
    assert len(web.sent(".tar")) == sent


@pytest.mark.parametrize("damage", ["payload", "index", "cut", "torn list", "false list", "absurd list"])
def test_a_damaged_cache_is_healed(web: WebServer, cache: Path, damage: str) -> None:
    local = TokenDataset(web.folder, SPLIT, LENGTH)
    kept = cache / local.fingerprint / first_shard(web.folder).name
    if damage == "false list":
        kept.parent.mkdir(parents=True)
        kept.with_name(kept.name + RANGES_SUFFIX).write_text("0 999999\n")
    else:
        assert_equal(TokenDataset(web.url, SPLIT, LENGTH, cache=cache), local)
    if damage == "payload":
        flip(kept, members_of(first_shard(web.folder))[0].offset)
    elif damage == "index":
        flip(kept.with_suffix(".idx.npy"), -1)
    elif damage == "cut":
        os.truncate(kept, 1000)
    elif damage == "torn list":
        kept.with_name(kept.name + RANGES_SUFFIX).write_bytes(b"51")
    elif damage == "absurd list":
        kept.with_name(kept.name + RANGES_SUFFIX).write_bytes(b"0 " + b"1" * 5000 + b"\n")
    assert_equal(TokenDataset(web.url, SPLIT, LENGTH, cache=cache), local)
    web.log.clear()
    assert_equal(TokenDataset(web.url, SPLIT, LENGTH, cache=cache), local)
    assert web.sent(".tar") == web.sent(".idx.npy") == []


def test_changed_remote_data_never_meet_an_old_cache(web: WebServer, cache: Path, prepared: Path) -> None:
    dataset = TokenDataset(web.url, SPLIT, LENGTH, cache=cache)
    dataset[0]
    manifest = (web.folder / MANIFEST).read_text()
    (web.folder / MANIFEST).write_text(manifest.replace('"source_bytes": ', '"source_bytes": 1'))
    TokenDataset(web.url, SPLIT, LENGTH, cache=cache)[0]
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("kind", ["payload", "index", "cut", "missing"])
def test_damage_on_the_server_is_damage(web: WebServer, cache: Path, kind: str) -> None:
    shard = first_shard(web.folder)
    member = members_of(shard)[0]
    if kind == "payload":
        flip(shard, member.offset)
        complaint = rf"member \d{{5}}-000000\.tok is damaged: expected crc32 {member.crc32:08x}, actual "
    elif kind == "index":
        flip(shard.with_suffix(".idx.npy"), -1)
        complaint = rf"index {web.url}/{shard.stem}\.idx\.npy is damaged: its sha256 is"
    elif kind == "cut":
        os.truncate(shard, 512)
        complaint = r"ends before byte \d+ and the manifest says \d+"
    else:
        shard.unlink()
        complaint = r"cannot be read \(No such file\)"
    dataset = TokenDataset(web.url, SPLIT, LENGTH, cache=cache)
    with pytest.raises(Damage, match=complaint) as error:
        dataset[0]
    assert error.value.shard == f"{web.url}/{shard.name}"
    dataset[len(dataset) - 1]  # and only its samples


def test_files_are_checked_by_their_heads(web: WebServer, cache: Path) -> None:
    dataset = TokenDataset(web.url, SPLIT, LENGTH, cache=cache)
    dataset.check_files()
    assert web.sent(".tar") == []
    shard = first_shard(web.folder)
    os.truncate(shard, 512)
    with pytest.raises(RunError, match=rf"{web.url}/{shard.name} has 512 bytes and the manifest says \d+ \(1 of the "):
        dataset.check_files()


def test_of_many_heads_the_one_that_fails_is_repeated(web: WebServer, cache: Path) -> None:
    dataset = TokenDataset(web.url, SPLIT, LENGTH, cache=cache)
    web.failures = [503, 500]
    web.log.clear()
    dataset.check_files()
    assert len(web.log) == 2 * len(dataset.manifest.splits[SPLIT]) + 2
    web.failures = [500] * 1000
    with pytest.raises(RunError, match=rf"{web.url}/validation-.* cannot be read \(500.*3 attempts\); check the net"):
        dataset.check_files()


def test_a_server_that_does_not_say_how_long_files_are_is_refused(web: WebServer, cache: Path) -> None:
    dataset = TokenDataset(web.url, SPLIT, LENGTH, cache=cache)
    web.lengths = False
    with pytest.raises(UsageError, match=rf"the server of {web.url}/.* does not say how long files are \(no Content-Le"):
        dataset.check_files()


def test_a_redirection_is_followed_without_the_password(
    web: WebServer, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with WebServer(tmp_path) as front, front.running():
        front.elsewhere = f"http://localhost:{web.server_port}"
        dataset = TokenDataset(front.url, SPLIT, LENGTH, cache=cache)
        dataset.check_files()
        np.testing.assert_array_equal(dataset[0].tokens, TokenDataset(web.folder, SPLIT, LENGTH)[0].tokens)
        assert None not in front.authorizations
        assert web.authorizations == {None}
        front.elsewhere = "ftp://user:secret@localhost"
        with pytest.raises(UsageError, match=rf"{front.url}/index.json is redirected to ftp://localhost, which is not as"):
            load_manifest(front.url)


def test_a_redirection_from_https_to_http_is_refused(web: WebServer, tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with WebServer(web.folder) as front:
        front.socket = context.wrap_socket(front.socket, server_side=True)
        with front.running():
            url = front.url.replace("http:", "https:")
            assert load_elsewhere(url, certificate) == load_manifest(web.folder).fingerprint
            front.elsewhere = web.url
            assert f"{url}/index.json is redirected to http://127.0.0.1, which is not as safe as https" in load_elsewhere(
                url, certificate
            )
    assert web.log == []


def load_elsewhere(url: str, certificate: Path) -> str:
    """What loading a manifest gives in a process that trusts ``certificate``: its fingerprint, or the error."""
    script = (
        "import sys; from trine.data_pipeline.shards.manifest import load_manifest\n"
        "try: print(load_manifest(sys.argv[1]).fingerprint)\n"
        "except Exception as error: print(error)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "SSL_CERT_FILE": str(certificate)}
    command = [sys.executable, "-c", script, url]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def make_certificate(folder: Path) -> Path:
    """A self-signed certificate of 127.0.0.1, with its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path


def test_a_passing_failure_is_overcome(web: WebServer, cache: Path) -> None:
    web.failures = [503, 500]
    dataset = TokenDataset(web.url, SPLIT, LENGTH, cache=cache)
    web.failures = [429, 503]
    np.testing.assert_array_equal(dataset[0].tokens, TokenDataset(web.folder, SPLIT, LENGTH)[0].tokens)


def test_a_lasting_failure_names_the_url(web: WebServer, cache: Path) -> None:
    dataset = TokenDataset(web.url, SPLIT, LENGTH, cache=cache)
    web.failures = [500] * 3
    with pytest.raises(
        RunError, match=rf"{web.url}/validation-.* cannot be read \(500.*3 attempts\); check the net"
    ) as error:
        dataset[0]
    assert not isinstance(error.value, Damage)
    dataset[0]
    web.failures = [403]
    with pytest.raises(RunError, match=rf"{web.url}/index\.json may not be read \(HTTP status 403\); check the cred"):
        load_manifest(web.url)


def test_a_server_that_is_down_is_said_in_a_sentence(cache: Path, tmp_path: Path) -> None:
    with WebServer(tmp_path) as server:
        url = server.url
    with pytest.raises(RunError, match=rf"{url}/index\.json cannot be read \(.*3 attempts\); check the network"):
        TokenDataset(url, SPLIT, LENGTH, cache=cache)


def test_a_server_without_ranges_is_refused(web: WebServer, cache: Path) -> None:
    web.ranges = False
    dataset = TokenDataset(web.url, SPLIT, LENGTH, cache=cache)
    with pytest.raises(
        UsageError, match=rf"server of {web.url}/validation-.*\.tar cannot send parts of files.*; use another"
    ):
        dataset[0]


def test_absence_is_named(web: WebServer) -> None:
    (web.folder / MANIFEST).unlink()
    with pytest.raises(UsageError, match=rf"{web.url} holds no prepared data \(index\.json is missing\)"):
        load_manifest(web.url)
    (web.folder / UNFINISHED).touch()
    with pytest.raises(UsageError, match=f"the preparation of data in {web.url} has not finished"):
        load_manifest(web.url)


@pytest.mark.parametrize("location", ["pipe:cat index.json", "ftp://host/folder", "gs://bucket/folder", "http:/one"])
def test_other_locations_are_refused(location: str) -> None:
    with pytest.raises(UsageError, match=f"{location} (would run a command|is no place that data are read from)"):
        TokenDataset(location, SPLIT, LENGTH)


@pytest.mark.parametrize(("location", "package"), [("http://host/x", "aiohttp"), ("s3://bucket/x", "s3fs")])
def test_a_missing_client_is_named(location: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # what the import system does for a package that is not there
    with pytest.raises(UsageError, match=rf"{location} needs the package {package}.*pip install 'trine\[remote\]'"):
        open_folder(location)


def test_a_full_disk_names_the_setting(web: WebServer, cache: Path) -> None:
    dataset = TokenDataset(web.url, SPLIT, LENGTH, cache=cache)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))  # the index fits, the first member does not
        with pytest.raises(
            RunError, match=rf"the cache of remote data {cache}/.* cannot be used \(File too large\); .*data\.cache"
        ):
            dataset[0]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    np.testing.assert_array_equal(dataset[0].tokens, TokenDataset(web.folder, SPLIT, LENGTH)[0].tokens)


def test_the_cache_is_where_the_user_keeps_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "trine"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "trine"


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40))), st.integers(0, 40), st.integers(0, 40))
def test_ranges_against_sets(added: list[tuple[int, int]], start: int, stop: int) -> None:
    ranges, expected = Ranges(), set[int]()
    for first, last in added:
        ranges.add(first, last)
        expected |= set(range(first, last))
    missing = ranges.missing(start, stop)
    assert [n for gap in missing for n in range(*gap)] == sorted(set(range(start, stop)) - expected)
    assert all(first < last for first, last in missing)


@pytest.fixture
def bucket(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The prepared corpus in an S3 store on loopback."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="corpora")
    for path in prepared.iterdir():
        client.upload_file(str(path), "corpora", f"small/{path.name}")
    yield "s3://corpora/small"
    server.stop()


def test_an_s3_store_that_sends_more_is_not_believed(
    bucket: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    read = s3fs.S3FileSystem._cat_file

    async def read_more(files: Any, url: str, start: int | None = None, end: int | None = None) -> bytes:
        return bytes(await read(files, url, start=start, end=end)) + b"more" * (start is not None)

    monkeypatch.setattr(s3fs.S3FileSystem, "_cat_file", read_more)
    dataset = TokenDataset(bucket, SPLIT, LENGTH, cache=cache)
    with pytest.raises(RunError, match=rf"{bucket}/validation-.* cannot be read \(.*asked for \d+ bytes and sent \d+, 3"):
        dataset[0]


def test_an_s3_store_gives_the_local_samples(bucket: str, prepared: Path, cache: Path) -> None:
    import boto3

    local = TokenDataset(prepared, SPLIT, LENGTH)
    dataset = TokenDataset(bucket, SPLIT, LENGTH, cache=cache)
    dataset.check_files()
    assert_equal(dataset, local)

    record = dataset.manifest.splits[SPLIT][0]
    client = boto3.client("s3")
    client.put_object(Bucket="corpora", Key=f"small/{record.name}", Body=b"short")
    assert_equal(TokenDataset(bucket, SPLIT, LENGTH, cache=cache), local)  # from the cache
    other = TokenDataset(bucket, SPLIT, LENGTH, cache=cache / "other")
    with pytest.raises(Damage, match=r"ends before byte \d+ and the manifest says"):
        other[0]
    with pytest.raises(RunError, match=rf"{bucket}/{record.name} has 5 bytes and the manifest says {record.bytes}"):
        other.check_files()
    client.delete_object(Bucket="corpora", Key=f"small/{record.name}")
    with pytest.raises(Damage, match=rf"shard {bucket}/{record.name} cannot be read \("):
        other[0]
    with pytest.raises(UsageError, match="the folder of prepared data s3://corpora/absent is not there"):
        load_manifest("s3://corpora/absent")
