"""SentencePiece models as encoders."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from trine.configs.errors import UsageError
from trine.data_pipeline.corpus import encoding, segments
from trine.data_pipeline.corpus.documents import Document
from trine.data_pipeline.corpus.encoding import encode_documents
from trine.data_pipeline.corpus.tokenizer import load_encoder, tokenizer_sha256

TEXTS = ["the cat sat on the mat", "le ch\u00e2t \u00e9tait l\u00e0", "def f(x): return x"] * 20
UINT16 = np.dtype("<u2")


def train(path: Path, **options: object) -> Path:
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 330,
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "minloglevel": 2,
        **options,
    }
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=model, **settings)
    path.write_bytes(model.getvalue())
    return path


def encode(path: Path, *texts: str) -> list[list[int]]:
    documents = [Document(text, "made") for text in texts]
    return [ids.tolist() for _, ids in encode_documents(load_encoder(path), documents, UINT16)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model")


def test_documents_are_encoded_as_the_package_does_and_ended(model: Path) -> None:
    encoder = load_encoder(model)
    assert (encoder.vocabulary_size, encoder.end_of_document, encoder.splits_text) == (330, 2, False)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert encode(model, *TEXTS) == [[*processor.encode(text), 2] for text in TEXTS]
    for text in ("a\0b", "\U0001f600 \u4e16\u754c"):
        (ids,) = encode(model, text)
        assert processor.decode(ids[:-1]) == text
    assert len(tokenizer_sha256(model)) == 64


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_only_the_end_of_a_document_gives_its_token(kind: str, tmp_path: Path) -> None:
    path = train(tmp_path / "some.model", model_type=kind)
    for ids in encode(path, "a</s>b", "</s>", "<s> </s> <unk>", "x"):
        assert ids.index(2) == len(ids) - 1
        assert 1 not in ids


def test_long_documents_are_not_cut(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(TEXTS)
    whole = encode(model, text, "x")
    monkeypatch.setattr(encoding, "SEGMENT_CHARACTERS", 7)
    monkeypatch.setattr(segments, "SEGMENT_CHARACTERS", 7)
    assert encode(model, text, "x") == whole


@pytest.mark.parametrize("options", [{"eos_id": -1}, {"user_defined_symbols": ["</s>"]}], ids=["none", "user-defined"])
def test_a_model_without_an_end_of_documents(options: dict[str, object], tmp_path: Path) -> None:
    path = train(tmp_path / "some.model", **options)
    with pytest.raises(UsageError, match=r"some\.model has no end-of-sentence control symbol, .* with --eos_id=2"):
        load_encoder(path)


def test_what_is_not_a_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "some.model"
    with pytest.raises(UsageError, match=r"tokenizer .*some\.model cannot be read \(No such file or directory\)"):
        load_encoder(path)
    for content in (b"", b"{}", b"IQ== 0\nIg== 1\n", b"\x0a\x00" * 40):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"some\.model is not a SentencePiece model; give one, or a tokenizer"):
            load_encoder(path)


def test_a_model_by_another_name_is_named(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "some.bin"
    path.write_bytes(model.read_bytes())
    with pytest.raises(UsageError, match=r"some\.bin is not a tokenizer .* whose name ends in \.model"):
        load_encoder(path)


def test_a_missing_package_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UsageError) as error:
        load_encoder(model)
    assert str(error.value) == (
        f"tokenizer {model} needs the package sentencepiece, which is not installed: pip install 'trine[sentencepiece]'"
    )
