"""``trine data verify`` and ``trine data stats`` as a user sees them."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from pathlib import Path

import matplotlib.image
import pytest
from small_folder import write_folder

from trine.configs.errors import UsageError
from trine.launch.data_reports import add_stats, add_verify

Capture = pytest.CaptureFixture[str]


def run(*words: str | Path) -> int:
    """Run a command as the command line does."""
    commands = ArgumentParser().add_subparsers()

    def add(name: str, summary: str, description: str, epilog: str) -> ArgumentParser:
        return commands.add_parser(name, help=summary, description=description, epilog=epilog)

    add_verify(add)
    add_stats(add)
    parser = commands.choices[str(words[0])]
    arguments = parser.parse_args([str(word) for word in words[1:]])
    code: int = arguments.command(arguments)
    return code


def test_verify_whole_data(tmp_path: Path, capsys: Capture) -> None:
    write_folder(tmp_path)
    assert run("verify", tmp_path) == 0
    assert capsys.readouterr() == (f"{tmp_path}: every byte is as it was written\n", "")


def test_verify_tells_problems_and_warnings(tmp_path: Path, capsys: Capture) -> None:
    write_folder(tmp_path)
    (tmp_path / "notes.txt").touch()
    assert run("verify", tmp_path, "--workers", "1") == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines == ["notes.txt: warning: the manifest does not name it, so nothing reads it"]
    assert last == f"{tmp_path}: every byte is as it was written, 1 warning"
    (tmp_path / "train-00000-000.tar").unlink()
    (tmp_path / "train-00000-001.idx.npy").unlink()
    assert run("verify", tmp_path) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines == [
        "train-00000-000.tar: it is missing",
        "train-00000-001.idx.npy: it is missing",
        "notes.txt: warning: the manifest does not name it, so nothing reads it",
    ]
    assert last == (f"{tmp_path}: 2 problems, 1 warning; restore these files from a copy, or prepare the data again")


REPORT = """\
  vocabulary       257 tokens, stored as uint16; 0 ends a document
  tokenizer        tokenizer.json, sha256 {tokenizer}
  fingerprint      {fingerprint}

              documents  tokens  shards   bytes
  train              12     121       6  61,440
  validation          4      47       3  30,720

tokens per document, with the token that ends it
              mean  median  p90  p99  longest
  train       10.1       3   25   40       40
  validation  11.8       5   31   31       31

documents that fit a sequence length
               2,048   4,096   8,192  32,768
  train       100.0%  100.0%  100.0%  100.0%
  validation  100.0%  100.0%  100.0%  100.0%

train: lengths of the documents
  tokens  documents  of documents  of tokens
  1-1             3         25.0%       2.5%  ##############################
  2-3             3         25.0%       6.6%  ##############################
  4-7             1          8.3%       5.8%  ##########
  8-15            2         16.7%      18.2%  ####################
  16-31           2         16.7%      33.9%  ####################
  32-63           1          8.3%      33.1%  ##########
"""


def test_stats_report(tmp_path: Path, capsys: Capture) -> None:
    manifest = write_folder(tmp_path)
    assert run("stats", tmp_path) == 0
    told = capsys.readouterr()
    assert told.err == ""
    expected = REPORT.format(tokenizer=manifest.tokenizer_sha256[:12], fingerprint=manifest.fingerprint)
    assert told.out.startswith(f"{tmp_path}: prepared from made\n{expected}\nvalidation: lengths of the documents\n")


def test_stats_as_json(tmp_path: Path, capsys: Capture) -> None:
    data, target = tmp_path / "data", tmp_path / "stats.json"
    manifest = write_folder(data, {"train": [[1, 1, 3000, 5000]]}, shard_tokens=3000, member_tokens=700)
    assert run("stats", data, "--json", "-") == 0
    told = capsys.readouterr()
    assert "tokens per document" in told.err
    assert run("stats", data, "--json", target) == 0
    assert target.read_text() == told.out
    document = json.loads(told.out)
    assert document["fingerprint"] == manifest.fingerprint
    assert list(document["splits"]) == ["train"]
    split = document["splits"]["train"]
    assert (split["documents"], split["tokens"], split["shards"]) == (4, 8002, len(manifest.splits["train"]))
    assert split["tokens_per_document"] == {"mean": 2000.5, "median": 1, "p90": 5000, "p99": 5000, "longest": 5000}
    assert split["share_fitting"] == {"2048": 0.5, "4096": 0.75, "8192": 1.0, "32768": 1.0}
    assert [bucket for bucket in split["histogram"] if bucket["documents"]] == [
        {"first": 1, "last": 1, "documents": 2, "tokens": 2},
        {"first": 2048, "last": 4095, "documents": 1, "tokens": 3000},
        {"first": 4096, "last": 8191, "documents": 1, "tokens": 5000},
    ]


def test_stats_picture(tmp_path: Path) -> None:
    data, target = tmp_path / "data", tmp_path / "lengths.png"
    write_folder(data)
    assert run("stats", data, "--picture", target) == 0
    height, width, _ = matplotlib.image.imread(target).shape
    assert (width, height) == (1500, 600)


def test_wrong_use_is_refused_before_the_data_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in ("verify", "stats"):
        with pytest.raises(UsageError, match="DIR=s3://bucket/data is a URL, and only local folders"):
            run(command, "s3://bucket/data")
        with pytest.raises(UsageError, match="would run a command"):
            run(command, "pipe:cat data")
    with pytest.raises(UsageError, match="--json .* cannot be written: name a file in a folder that exists"):
        run("stats", tmp_path, "--json", tmp_path / "nowhere" / "stats.json")
    with pytest.raises(UsageError, match="--picture .* cannot be written"):
        run("stats", tmp_path, "--picture", tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # so that it is not found
    with pytest.raises(UsageError, match=r"--picture needs the package matplotlib, .*'trine\[plot\]'"):
        run("stats", tmp_path, "--picture", tmp_path / "lengths.png")
