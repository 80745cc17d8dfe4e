"""Speed of the preparation against the tokenizer library alone, on the same text, in turns. Prints one JSON object.

    python tests/data/preparation/preprocess_speed.py FOLDER {tokenizers,sentencepiece,tiktoken} WORKERS [SECONDS]

The text is Python's own library, several times over where that is encoded too fast to be measured; the tokenizers are
trained on it. `ratio`, the measure, is MB/s over W x MB/s of the library in one process. The other two tell why it is
low: `parallel_ratio` is MB/s over that of the library in W processes at once, which is the same where W cores are free
and as fast together as one alone; `cpu_ratio` compares MB per second of processor time, which other programs on the
machine do not disturb much.
"""

from __future__ import annotations

import base64
import io
import json
import multiprocessing
import os
import resource
import sys
import time
from pathlib import Path

from megatron_tf.corpora.corpus import python_modules
from megatron_tf.data.preparation.bpe import train_bpe
from megatron_tf.data.preparation.preprocess import PreprocessSettings, preprocess
from megatron_tf.data.preparation.progress import ProgressDisplay
from megatron_tf.data.tiktoken_files import GPT2_PATTERN

ROUNDS = 3
TEXT_MEGABYTES = 4.0
BATCH = 128


def make_texts(megabytes: float) -> list[str]:
    texts, size = [], 0
    for document in python_modules():
        if document.text.strip():
            texts.append(document.text)
            size += len(document.text.encode())
        if size > megabytes * 1e6:
            break
    return texts


def make_tokenizer(folder: Path, kind: str, texts: list[str]) -> Path:
    some = texts[: len(texts) // 8]
    if kind == "tokenizers":
        train_bpe(some, 8000, folder / "t.json")
        return folder / "t.json"
    if kind == "sentencepiece":
        import sentencepiece

        lines = [line[:4000] for text in some[:200] for line in text.splitlines() if line.strip()]
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_prefix=str(folder / "t"), vocab_size=4000, model_type="bpe",
            byte_fallback=True, minloglevel=2, character_coverage=0.999,
        )  # fmt: skip
        return folder / "t.model"
    train_bpe(some, 8000, folder / "t.json")
    write_ranks(folder / "t.json", folder / "t.tiktoken")
    return folder / "t.tiktoken"


def write_ranks(source: Path, target: Path) -> None:
    """A byte-level BPE of the tokenizers library as a rank file."""
    from tokenizers.pre_tokenizers import ByteLevel

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(number): number for number in printable}
    others = [number for number in range(256) if number not in printable]
    letters |= {chr(256 + place): number for place, number in enumerate(others)}
    assert set(letters) == set(ByteLevel.alphabet())
    model = json.loads(source.read_text())["model"]
    tokens = sorted((number, token) for token, number in model["vocab"].items() if token != "<|endoftext|>")
    singles = [bytes([number]) for number in range(256)]
    merged = [bytes(letters[letter] for letter in token) for _, token in tokens if len(token) > 1]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate([*singles, *merged])]
    target.write_bytes(b"".join(lines))
    spec = {"pat_str": GPT2_PATTERN, "special_tokens": {"<|endoftext|>": len(lines)}}
    target.with_name(target.name + ".json").write_text(json.dumps(spec))


def bare_seconds(kind: str, path: str, texts: list[str]) -> tuple[float, float]:
    """(On the clock, of processor time) of the library's own batch call on one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if kind == "tokenizers":
        import tokenizers

        encode = tokenizers.Tokenizer.from_file(path).encode_batch_fast
    elif kind == "sentencepiece":
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=path)

        def encode(batch: list[str]) -> object:
            return processor.encode(batch, num_threads=1)
    else:
        from megatron_tf.data.tokenizer import load_tokenizer

        encoding = load_tokenizer(path)._encoding  # type: ignore[attr-defined]

        def encode(batch: list[str]) -> object:
            return encoding.encode_ordinary_batch(batch, num_threads=1)

    encode(texts[:1])
    started, cpu = time.perf_counter(), time.process_time()
    for start in range(0, len(texts), BATCH):
        encode(texts[start : start + BATCH])
    return time.perf_counter() - started, time.process_time() - cpu


def cpu_seconds() -> float:
    """Of this process and those it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def our_seconds(folder: Path, path: Path, workers: int) -> tuple[float, float]:
    settings = PreprocessSettings((str(folder / "*.jsonl"),), str(path), str(folder / "out"), workers=workers)
    started, cpu = time.perf_counter(), cpu_seconds()
    preprocess(settings, ProgressDisplay(io.StringIO()))
    seconds = time.perf_counter() - started, cpu_seconds() - cpu
    for file in folder.glob("out*"):
        file.unlink()
    return seconds


def main() -> None:
    folder, kind, workers = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    target_seconds = float(sys.argv[4]) if len(sys.argv) > 4 else 10.0
    texts = make_texts(TEXT_MEGABYTES)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    path = make_tokenizer(folder, kind, texts)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:  # what these leave in memory is not ours
        task = (kind, str(path), texts)
        times = max(1, round(target_seconds / pool.apply(bare_seconds, task)[0]))
        task = (kind, str(path), texts * times)
        for number in range(4):
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[number::4])
            with open(folder / f"{number}.jsonl", "w") as file:
                for _ in range(times * workers):
                    file.write(lines)
        bare, parallel, ours = [], [], []
        for _ in range(ROUNDS):
            bare.append([times * megabytes / s for s in pool.apply(bare_seconds, task)])
            slowest = max(seconds for seconds, _ in pool.starmap(bare_seconds, [task] * workers, chunksize=1))
            parallel.append(workers * times * megabytes / slowest)
            ours.append([times * workers * megabytes / s for s in our_seconds(folder, path, workers)])
    bare_speed, bare_cpu = map(max, zip(*bare, strict=True))
    our_speed, our_cpu = map(max, zip(*ours, strict=True))
    result = {
        "tokenizer": kind,
        "workers": workers,
        "megabytes": round(times * workers * megabytes, 1),
        "bare_mb_per_s": round(bare_speed, 2),
        "ours_mb_per_s": round(our_speed, 2),
        "ratio": round(our_speed / (workers * bare_speed), 3),
        "parallel_ratio": round(our_speed / max(parallel), 3),
        "cpu_ratio": round(our_cpu / bare_cpu, 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
