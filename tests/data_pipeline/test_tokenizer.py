"""Byte-level BPE: deterministic, lossless, and safe against what a tokenizer file may ask for."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from trine.configs.errors import UsageError
from trine.data_pipeline.corpus import encoding, segments
from trine.data_pipeline.corpus.documents import Document
from trine.data_pipeline.corpus.encoding import encode_documents
from trine.data_pipeline.corpus.tokenizer import (
    TokenizersEncoder,
    end_of_document_id,
    load_encoder,
    tokenizer_sha256,
    train_byte_level_bpe,
    vocabulary_size,
)

TEXTS = ["the cat sat on the mat", "le ch\u00e2t \u00e9tait l\u00e0", "def f(x):\n    return x\n"] * 3
UINT16 = np.dtype("<u2")


def encode(tokenizer: Tokenizer, *texts: str) -> list[list[int]]:
    documents = [Document(text, "made") for text in texts]
    return [ids.tolist() for _, ids in encode_documents(TokenizersEncoder(tokenizer), documents, UINT16)]


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


def test_only_the_end_of_a_document_gives_its_token() -> None:
    tokenizer = train_byte_level_bpe(TEXTS, 280)
    for ids in encode(tokenizer, "a<|endoftext|>b", "x"):
        assert ids.index(0) == len(ids) - 1


def test_long_documents_keep_the_tokens_they_would_have_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_byte_level_bpe(TEXTS, 280)
    texts = [" ".join(TEXTS), "x", "nowhitespace" * 20, "  \n\n a  b \n c d\n\n\n e "]
    whole = encode(tokenizer, *texts)
    assert [len(ids) for ids in whole] == [len(tokenizer.encode(text).ids) + 1 for text in texts]
    assert TokenizersEncoder(tokenizer).splits_text
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
    (ids,) = load_encoder(tmp_path / "tokenizer.json").encode_batch([TEXTS[0]])
    assert tokenizer.decode(ids) == TEXTS[0]
    assert len(tokenizer_sha256(tmp_path / "tokenizer.json")) == 64


def test_what_is_not_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.json cannot be read \(No such file or directory\)"):
        load_encoder(tmp_path / "absent.json")
    with pytest.raises(UsageError, match=r"absent\.json cannot be read"):
        tokenizer_sha256(tmp_path / "absent.json")
    for content in (b"{}", b"\xff\xfe", b'{"model": 3}'):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(UsageError, match=r"bad\.json is not a tokenizer of the tokenizers package"):
            load_encoder(tmp_path / "bad.json")
    with pytest.raises(UsageError, match=r"no token that ends a document; add one of <\|endoftext\|>"):
        end_of_document_id(Tokenizer(models.BPE()))


def test_holes_in_a_vocabulary_count() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 70_000}, unk_token="a"))
    assert vocabulary_size(tokenizer) == 70_001
    assert end_of_document_id(tokenizer) == 70_000


def metaspace() -> Tokenizer:
    """As SentencePiece models are usually converted: a space is added before a text by the normalizer."""
    vocabulary = {name: id for id, name in enumerate(["<unk>", "</s>", "\u2581", *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return tokenizer


def prefixed() -> Tokenizer:
    tokenizer = train_byte_level_bpe(TEXTS, 280)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def several_words() -> Tokenizer:
    """One of its tokens holds the end of a word and the beginning of the next."""
    vocabulary = {name: id for id, name in enumerate(["<unk>", "</s>", "t a", "t ", *" abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", " "), ("t ", "a")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n"), "isolated")
    return tokenizer


@pytest.mark.parametrize("make", [metaspace, several_words])
def test_a_text_is_not_cut_for_a_tokenizer_that_would_give_it_other_tokens(
    make: Callable[[], Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, text = make(), " ".join(["a cat and a dog"] * 5)
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    monkeypatch.setattr(encoding, "SEGMENT_CHARACTERS", 3)
    monkeypatch.setattr(segments, "SEGMENT_CHARACTERS", 3)
    pieces = [tokenizer.encode(piece, add_special_tokens=False).ids for piece in segments.segments(text)]
    assert sum(map(len, pieces)) > len(whole)  # so cutting would show
    assert not TokenizersEncoder(tokenizer).splits_text
    assert encode(tokenizer, text) == [[*whole, end_of_document_id(tokenizer)]]


@pytest.mark.parametrize("size", [1, 7, 40])
@pytest.mark.parametrize("make", [prefixed, lambda: train_byte_level_bpe(TEXTS, 280)])
def test_tokenizers_that_cut_at_words_or_not_are_encoded_as_in_one(
    make: Callable[[], Tokenizer], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make()
    tokenizer.normalizer = normalizers.NFC()
    texts = [" ".join(TEXTS), "e\u0301 la\u0300 \u4e2d \u6587 9 9 a_ _b", " leading", "caf\u00e9 <|endoftext|> x"]
    tokenizer.encode_special_tokens = True
    whole = [[*tokenizer.encode(text, add_special_tokens=False).ids, 0] for text in texts]
    monkeypatch.setattr(encoding, "SEGMENT_CHARACTERS", size)
    monkeypatch.setattr(segments, "SEGMENT_CHARACTERS", size)
    assert encode(tokenizer, *texts) == whole


@pytest.mark.parametrize(
    ("token", "cuts"),
    [
        (AddedToken("cat sat on"), False),
        (AddedToken("t\u00a0sat", normalized=True), False),
        (AddedToken("cat", rstrip=True), False),
        (AddedToken(" sat", single_word=True), False),
        (AddedToken("cat", lstrip=True), True),
        (AddedToken(" sat"), True),
        (AddedToken("  "), True),
        (AddedToken("cat sat on", special=True), True),
    ],
)
@pytest.mark.parametrize("normalizer", [None, normalizers.NFKC()])
def test_added_tokens_are_the_same_wherever_a_text_is_cut(
    token: AddedToken, cuts: bool, normalizer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = train_byte_level_bpe(TEXTS, 280)
    tokenizer.normalizer = normalizer
    tokenizer.add_tokens([token])
    encoder = TokenizersEncoder(tokenizer)
    assert encoder.splits_text == cuts
    text = "the cat sat on the  mat, xcat  sat on " * 3
    (whole,) = encode(tokenizer, text)
    for size in range(1, 40):
        monkeypatch.setattr(encoding, "SEGMENT_CHARACTERS", size)
        monkeypatch.setattr(segments, "SEGMENT_CHARACTERS", size)
        assert encode(tokenizer, text) == [whole]


def test_bpe_dropout_of_a_file_is_undone(tmp_path: Path) -> None:
    tokenizer = train_byte_level_bpe(TEXTS, 280)
    whole = TokenizersEncoder(tokenizer).encode_batch(TEXTS)
    tokenizer.model.dropout = 0.5
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert all(load_encoder(tmp_path / "tokenizer.json").encode_batch(TEXTS) == whole for _ in range(5))


def test_a_long_document_is_held_as_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "SEGMENT_CHARACTERS", 10_000)
    monkeypatch.setattr(segments, "SEGMENT_CHARACTERS", 10_000)
    encoder = TokenizersEncoder(train_byte_level_bpe([], 257))
    document = Document("ab " * 300_000, "made")
    tracemalloc.start()
    ((_, ids),) = encode_documents(encoder, [document], UINT16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The text once more in its pieces, the ids in pieces and in one; a list alone would need 8 bytes for each.
    assert ids.size == 900_001
    assert peak < 900_000 * (1 + 2 + 2) * 1.3


def test_a_tokenizer_that_finds_the_end_of_a_document_in_texts_is_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "words.json"))
    with pytest.raises(UsageError, match="the tokenizer takes </s> in a text for its token 1, so that any text with"):
        load_encoder(tmp_path / "words.json")


def test_an_encoder_knows_its_vocabulary(tmp_path: Path) -> None:
    train_byte_level_bpe(TEXTS, 280).save(str(tmp_path / "any.json"))
    encoder = load_encoder(tmp_path / "any.json")
    assert (encoder.vocabulary_size, encoder.end_of_document, encoder.splits_text) == (280, 0, True)
    assert encoder.encode_batch([]) == []


def test_ids_that_do_not_fit_are_an_error() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 70_000, "<eos>": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(OverflowError):
        encode(tokenizer, "a b")
