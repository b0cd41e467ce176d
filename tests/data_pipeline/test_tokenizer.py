"""Byte-level BPE: deterministic, lossless, and safe against what a tokenizer file may ask for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from trine.configs.errors import UsageError
from trine.data_pipeline import encoding, segments
from trine.data_pipeline.encoding import encode_documents
from trine.data_pipeline.sources import Document
from trine.data_pipeline.tokenizer import (
    end_of_document_id,
    load_tokenizer,
    sample_evenly,
    tokenizer_sha256,
    train_byte_level_bpe,
    vocabulary_size,
)

TEXTS = ["the cat sat on the mat", "le ch\u00e2t \u00e9tait l\u00e0", "def f(x):\n    return x\n"] * 3
UINT16 = np.dtype("<u2")


def encode(tokenizer: Tokenizer, *texts: str) -> list[list[int]]:
    documents = [Document(text, "made") for text in texts]
    return [ids.tolist() for _, ids in encode_documents(tokenizer, documents, UINT16)]


def test_training_is_deterministic_and_id_0_ends_documents() -> None:
    one, other = train_byte_level_bpe(TEXTS, 280), train_byte_level_bpe(iter(TEXTS), 280)
    assert one.to_str() == other.to_str()
    assert end_of_document_id(one) == 0
    assert vocabulary_size(one) == 280


def test_every_byte_is_in_the_smallest_vocabulary() -> None:
    tokenizer = train_byte_level_bpe([], 257)
    assert vocabulary_size(tokenizer) == 257
    text = "".join(map(chr, range(256))) + "\U0001f600"
    (ids,) = encode(tokenizer, text)
    assert tokenizer.decode(ids[:-1]) == text
    with pytest.raises(UsageError, match="vocabulary of 256 tokens cannot hold every byte; ask for 257"):
        train_byte_level_bpe([], 256)


def test_a_tokenizer_is_trained_on_a_sample_from_all_along_the_documents() -> None:
    texts = [f"{n:010d}" for n in range(1000)]
    assert sample_evenly(iter(texts), 10_000) == texts
    sample = sample_evenly(iter(texts), 1000)
    assert sample == texts[::16]  # the smallest power of two that keeps at most 100 documents
    assert sample_evenly(["a" * 50, "b" * 5], 20) == ["a" * 20]
    assert sample_evenly([], 20) == []


def test_only_the_end_of_a_document_gives_its_token() -> None:
    tokenizer = train_byte_level_bpe(TEXTS, 280)
    for ids in encode(tokenizer, "a<|endoftext|>b", "x"):
        assert ids.index(0) == len(ids) - 1


def test_long_documents_keep_the_tokens_they_would_have_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_byte_level_bpe(TEXTS, 280)
    texts = [" ".join(TEXTS), "x", "nowhitespace" * 20, "  \n\n a  b \n c d\n\n\n e "]
    whole = encode(tokenizer, *texts)
    assert [len(ids) for ids in whole] == [len(tokenizer.encode(text).ids) + 1 for text in texts]
    for size in (1, 7, 40):
        monkeypatch.setattr(encoding, "SEGMENT_CHARACTERS", size)
        monkeypatch.setattr(segments, "SEGMENT_CHARACTERS", size)
        assert len(segments.segments(texts[0])) > 1
        assert encode(tokenizer, *texts) == whole
        assert train_byte_level_bpe(TEXTS, 280).to_str() == tokenizer.to_str()


def test_truncation_and_padding_of_a_file_are_undone(tmp_path: Path) -> None:
    tokenizer = train_byte_level_bpe(TEXTS, 280)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.decode(loaded.encode(TEXTS[0]).ids) == TEXTS[0]
    assert len(tokenizer_sha256(tmp_path / "tokenizer.json")) == 64


def test_what_is_not_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.json cannot be read \(No such file or directory\)"):
        load_tokenizer(tmp_path / "absent.json")
    with pytest.raises(UsageError, match=r"absent\.json cannot be read"):
        tokenizer_sha256(tmp_path / "absent.json")
    for content in (b"{}", b"\xff\xfe", b'{"model": 3}'):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(UsageError, match=r"bad\.json is not a tokenizer of the tokenizers package"):
            load_tokenizer(tmp_path / "bad.json")
    with pytest.raises(UsageError, match=r"no token that ends a document; add one of <\|endoftext\|>"):
        end_of_document_id(Tokenizer(models.BPE()))


def test_holes_in_a_vocabulary_count() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 70_000}, unk_token="a"))
    assert vocabulary_size(tokenizer) == 70_001
    assert end_of_document_id(tokenizer) == 70_000
