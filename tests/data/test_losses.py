"""What tokenizers lose of a text: seen whatever the reason, and never seen where nothing is lost."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_tf.data.losses import MOST_PIECES, SAMPLE, Loss, LossFinder, comes_back
from megatron_tf.data.preparation.bpe import train_bpe
from megatron_tf.data.tokenizer import load_tokenizer

pytest.importorskip("tokenizers")
LATIN = "the quick brown fox jumps over a lazy dog, 0123456789. " * 3


def loss_of(path: Path | str, text: str) -> Loss:
    tokenizer = load_tokenizer(path)
    return LossFinder(tokenizer).find(text, tokenizer.encode_arrays([text]))


def save(path: Path, model: str, normalizer=None, pre_tokenizer=None, **options) -> Path:
    """A tokenizer of LATIN's characters and nothing else."""
    from tokenizers import Tokenizer, models, trainers

    unknown = {"WordPiece": "[UNK]", "WordLevel": "<unk>"}.get(model, options.get("unk_token"))
    special = ["</s>"] + ([unknown] if unknown else [])
    trainer_options = {"unk_token": "<unk>"} if model == "Unigram" else {}
    if model == "Unigram":
        special.append("<unk>")
    elif unknown:
        options["unk_token"] = unknown
    tokenizer = Tokenizer(getattr(models, model)(**options))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    trainer = getattr(trainers, {"BPE": "BpeTrainer"}.get(model, model + "Trainer"))
    tokenizer.train_from_iterator([LATIN], trainer(special_tokens=special, show_progress=False, **trainer_options))
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("model", ["BPE", "BPE with unknown", "Unigram", "WordPiece", "WordLevel"])
def test_characters_that_a_model_does_not_know(tmp_path, model):
    from tokenizers import pre_tokenizers

    options = {"unk_token": "<unk>"} if model == "BPE with unknown" else {}
    path = save(tmp_path / "t.json", model.split()[0], pre_tokenizer=pre_tokenizers.Whitespace(), **options)
    assert not loss_of(path, "the quick fox")
    loss = loss_of(path, "the 日本 fox ζ 日本")
    assert loss.characters == 5 and loss.visible
    assert Counter("".join(piece * count for piece, count in loss.pieces.items())) == Counter("日日本本ζ")


def test_an_unknown_word_is_named_by_its_beginning_and_a_written_unknown_token_is_not_one(tmp_path):
    from tokenizers import pre_tokenizers

    path = save(tmp_path / "t.json", "WordLevel", pre_tokenizer=pre_tokenizers.Whitespace())
    loss = loss_of(path, "the <unk> fox is an " + "extraordinarily" * 3)
    assert loss.characters == len("is") + len("an") + 45
    assert loss.pieces == {"is": 1, "an": 1, "extraordinarilyextra": 1}


def test_characters_that_a_normalizer_drops(tmp_path):
    from tokenizers import Regex, normalizers, pre_tokenizers

    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    dropping = normalizers.Sequence([normalizers.Replace("§", ""), normalizers.Replace(Regex("[\u200b\x00]"), "")])
    train_bpe([LATIN], 300, tmp_path / "whole.json")
    content = json.loads((tmp_path / "whole.json").read_text())
    tokenizer = save(tmp_path / "t.json", "BPE", dropping, level)
    content["normalizer"] = json.loads(tokenizer.read_text())["normalizer"]
    (tmp_path / "t.json").write_text(json.dumps(content))
    loss = loss_of(tmp_path / "t.json", "a§ 日\u200b\u200b b§")
    assert loss.pieces == {"§": 2, "\u200b": 2} and loss.visible
    hidden = loss_of(tmp_path / "t.json", "a\x00b")
    assert hidden and not hidden.visible
    assert comes_back(load_tokenizer(tmp_path / "t.json")) is None


def test_nothing_is_lost_in_bytes(tmp_path):
    train_bpe([LATIN], 300, tmp_path / "t.json")
    text = "Zürich 日本 🦊\u200b\x00\ufffd e\u0301 \ue000 \u200d"
    for path in ("bytes", tmp_path / "t.json"):
        assert not loss_of(path, text)
        assert comes_back(load_tokenizer(path)) is None


def test_text_that_changes_on_the_way_is_seen(tmp_path):
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, normalizers, pre_tokenizers

    path = save(tmp_path / "t.json", "WordPiece", normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer())
    library = Library.from_file(str(path))
    library.decoder = decoders.WordPiece()
    library.save(str(path))
    returned = comes_back(load_tokenizer(path))
    assert returned is not None and returned != SAMPLE and "b" in returned


def test_sentencepiece(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    for fallback in (False, True):
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([LATIN]), model_writer=out, vocab_size=320 if fallback else 60, minloglevel=2,
            byte_fallback=fallback, hard_vocab_limit=False,
        )  # fmt: skip
        (tmp_path / f"{fallback}.model").write_bytes(out.getvalue())
    assert not loss_of(tmp_path / "True.model", "the 日本 fox")
    loss = loss_of(tmp_path / "False.model", "the 日本 fox\x01 <unk> 日本")
    assert loss.pieces["日本"] == 2 and loss.visible
    assert comes_back(load_tokenizer(tmp_path / "True.model")) != SAMPLE  # white space is joined, signs are replaced


def test_a_pattern_that_does_not_match_everything(tmp_path):
    pytest.importorskip("tiktoken")
    ranks = (base64.b64encode(bytes([number])) + b" %d\n" % number for number in range(256))
    (tmp_path / "own.tiktoken").write_bytes(b"".join(ranks))
    spec = {"pat_str": r"\w+| ", "special_tokens": {"<|endoftext|>": 256}}
    (tmp_path / "own.tiktoken.json").write_text(json.dumps(spec))
    loss = loss_of(tmp_path / "own.tiktoken", "a, b, c!")
    assert loss.pieces == {",": 2, "!": 1}
    assert load_tokenizer(tmp_path / "own.tiktoken").encode_spans("a, b") is None


def test_losses_add_up_and_stay_bounded():
    total = Loss()
    for number in range(4 * MOST_PIECES):
        total.add(Loss(2, Counter({f"{number}": 1, "x": 1}), True))
    assert (total.characters, total.visible, total.pieces["x"]) == (8 * MOST_PIECES, True, 4 * MOST_PIECES)
    assert len(total.pieces) <= 2 * MOST_PIECES + 1
    assert str(total).startswith("4,000 characters ('x' 2,000, ") and str(total).endswith(", ...)")
