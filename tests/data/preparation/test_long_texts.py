"""Long texts in windows: the tokens are those of the whole text, or it is not taken apart."""

from __future__ import annotations

import base64
import io
import json
import random
from pathlib import Path

import numpy as np
import pytest

from megatron_tf.data.preparation import long_texts
from megatron_tf.data.preparation.long_texts import encode_long, is_long
from megatron_tf.data.tiktoken_files import CL100K_PATTERN
from megatron_tf.data.tokenizer import load_tokenizer

pick = random.Random(0)
WORDS = ["The", "fox", "number", "17", "jumps", "over\n\n", "", "the", "dogs'", "unbelievable", "tokenization,", "e.g."]
WORDS += ["x=f(y);\tZürich", "東京", "🦊", "1,234.5", "(see", "below)", "3rd", "--", "e\u0301tude"]
PROSE = " ".join(pick.choice(WORDS) for _ in range(1000))
SIGNS = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏"
TEXTS = {
    "prose": PROSE,
    "no blank": PROSE.replace(" ", "").replace("\n", ""),
    "chinese": "".join(pick.choice(SIGNS) + ("。\n" if number % 41 == 40 else "") for number in range(6000)),
    "base64": base64.b64encode(pick.randbytes(4500)).decode(),
    "numbers": "".join(f"{pick.randrange(10 ** pick.randrange(1, 30))}," for _ in range(500)),
    "digits": "3." + "".join(pick.choice("0123456789") for _ in range(6001)),
    "more digits": "a" + "".join(pick.choice("0123456789") for _ in range(6001)),
    "one letter": "x" * 6003,
    "spaces": "a" + " " * 6007 + "b",
    "pairs": "ab" * 3000,
    "genes": "".join(pick.choice("ACGT") for _ in range(6000)),
}
# In these every run of one kind of character is far shorter than an overlap.
VARIED = ("prose", "no blank", "chinese", "base64", "numbers")


def save_tokenizers_file(path: Path, model, trainer, pre_tokenizer, normalizer=None) -> str:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator([text[:1000] for text in TEXTS.values()], trainer)
    tokenizer.save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, str]:
    """Kind -> path of a tokenizer."""
    from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("tokenizers")
    level = pre_tokenizers.ByteLevel
    of_bytes = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["</s>"], initial_alphabet=level.alphabet(), show_progress=False
    )
    byte_tokens = [f"<0x{number:02X}>" for number in range(256)]
    with_fallback = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", "</s>", *byte_tokens], show_progress=False
    )

    def split(pattern: str):
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated"), level(add_prefix_space=False, use_regex=False)]
        )

    plain = {
        "gpt2": level(add_prefix_space=False),
        "space before": level(add_prefix_space=True),
        "digits from the left": split(r"\p{N}{1,3}|[^\s\p{N}]+|\s+"),
        "digits in pairs": split(r"\p{N}{1,2}|[^\s\p{N}]+|\s+"),
        "digits from the right": split(r"\d{1,3}(?=(?:\d{3})*(?:\D|$))|[^\s\d]+|\s+"),
    }
    found = {"bytes": "bytes"}
    for name, pre_tokenizer in plain.items():
        found[name] = save_tokenizers_file(folder / f"{name}.json", models.BPE(), of_bytes, pre_tokenizer)
    found["llama"] = save_tokenizers_file(
        folder / "llama.json", models.BPE(byte_fallback=True, unk_token="<unk>"), with_fallback,
        pre_tokenizers.Metaspace(prepend_scheme="always", split=False),
    )  # fmt: skip
    found["word pieces"] = save_tokenizers_file(
        folder / "bert.json", models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=800, special_tokens=["[UNK]", "[SEP]"], show_progress=False),
        pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer(),
    )  # fmt: skip
    found["unigram"] = save_tokenizers_file(
        folder / "unigram.json", models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=600, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
        ),
        pre_tokenizers.Metaspace(split=False),
    )  # fmt: skip
    ranks = [bytes([number]) for number in range(256)] + [b"000", b"12", b"  ", b"ab", b"xx", "日".encode(), b"fo"]
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks))
    (folder / "own.tiktoken").write_bytes(b"".join(lines))
    (folder / "own.tiktoken.json").write_text(json.dumps({"pat_str": CL100K_PATTERN, "special_tokens": {"</s>": 300}}))
    return {**found, "tiktoken": str(folder / "own.tiktoken"), **sentencepiece_models(folder)}


def sentencepiece_models(folder: Path) -> dict[str, str]:
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = [line for text in TEXTS.values() for line in text[:1000].split("\n") if line]
    found = {}
    for name, kind in {"pieces of pairs": "bpe", "pieces by chance": "unigram"}.items():
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=out, vocab_size=700, model_type=kind, minloglevel=2,
            hard_vocab_limit=False, byte_fallback=True,
        )  # fmt: skip
        (folder / f"{kind}.model").write_bytes(out.getvalue())
        found[name] = str(folder / f"{kind}.model")
    return found


KINDS = ["bytes", "gpt2", "space before", "digits from the left", "digits in pairs", "digits from the right", "llama"]
KINDS += ["word pieces", "unigram", "tiktoken", "pieces of pairs", "pieces by chance"]
NEVER_APART = ("unigram", "pieces by chance")


@pytest.mark.parametrize("kind", KINDS)
def test_windows_give_the_tokens_of_the_whole_or_nothing(paths, kind, monkeypatch):
    pytest.importorskip("tiktoken" if kind == "tiktoken" else "tokenizers")
    tokenizer = load_tokenizer(paths[kind])
    apart = set()
    for name, text in TEXTS.items():
        whole = tokenizer.encode_batch([text])[0]
        for window, overlap in ((1009, 400), (2003, 800)):
            monkeypatch.setattr(long_texts, "WINDOW_CHARACTERS", window)
            monkeypatch.setattr(long_texts, "OVERLAP_CHARACTERS", overlap)
            found = encode_long(tokenizer, text)
            if found is not None:
                apart.add(name)
                assert len(found) > len(text) // window and np.concatenate(found).tolist() == whole, (name, window)
    # A word of base64 is one unknown piece, however long it is.
    wanted = () if kind in NEVER_APART else (set(VARIED) - ({"base64"} if kind == "word pieces" else set()))
    assert apart >= set(wanted) and not apart - set(VARIED), apart


def test_what_is_long(paths, monkeypatch):
    assert not is_long("x" * long_texts.WINDOW_CHARACTERS) and is_long("x" * (long_texts.WINDOW_CHARACTERS + 1))
    monkeypatch.setattr(long_texts, "WINDOW_CHARACTERS", 100)
    assert encode_long(load_tokenizer("bytes"), PROSE[:100])[0].tolist() == list(PROSE[:100].encode())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tiktoken"])
def test_spans_are_the_tokens_and_their_places(paths, kind):
    tokenizer = load_tokenizer(paths[kind])
    text = "Zürich 17,123 日月 "
    spans = tokenizer.encode_spans(text)
    assert spans is not None and spans.ids.tolist() == tokenizer.encode_batch([text])[0]
    assert (np.diff(spans.starts) >= 0).all() and spans.stops[-1] <= len(text) and spans.starts[0] == 0
    assert spans.moved(5).starts.tolist() == [start + 5 for start in spans.starts.tolist()]


def test_places_of_bytes():
    pytest.importorskip("tokenizers")
    spans = load_tokenizer("bytes").encode_spans("aé日b")
    assert spans is not None
    assert spans.starts.tolist() == [0, 1, 1, 2, 2, 2, 3] and spans.stops.tolist() == [1, 2, 2, 3, 3, 3, 4]
