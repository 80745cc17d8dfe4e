"""The whole story on a bare machine: prepare real text, train, grow, go on training, and show what came of it.

Every step is one of the project's own commands and is printed before it runs. In addition to the grown model the small
one is trained on for as many steps, as a control. Data go to data/demo, runs to --folder. Nothing is deleted: runs that
are complete are not repeated, and one that was cut off goes on; remove the folder for a new story. `make demo` calls
this.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tf.arguments import path, whole_number
from megatron_tf.config.load import load_config
from megatron_tf.errors import UserError
from megatron_tf.paths import literal
from megatron_tf.shipped import configurations
from megatron_tf.tasks.language_model.perplexity import format_perplexity
from megatron_tf.tasks.language_model.section import vocab_size_of
from megatron_tf.telemetry import text

DATA = Path("data/demo")
SMALL, GROWN = "demo", "demo_grow"
UNSPLIT = ("parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence=false")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=whole_number(256), default=2, help="processes to train on (default 2)")
    parser.add_argument(
        "--folder", type=path, default="runs/demo", metavar="DIR", help="of the runs (default runs/demo)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="for all runs")
    arguments = parser.parse_intermixed_args()
    started = time.monotonic()
    config = load_config(configurations()[SMALL], arguments.overrides)
    prepare(vocab_size_of(config.model))
    small, control, grown = (arguments.folder / name for name in ("small", "control", "grown"))
    tokens = json.dumps(config.model.model_dump()["parameter_tokens"])
    own = {
        small: [SMALL],
        grown: [GROWN, f"growth.from={literal(str(small))}"],
        # The weights of the small run and the schedule of the grown one, on the same text in another order.
        control: [GROWN, "growth=null", f"training.init_from={literal(str(small))}", f"run.seed={config.run.seed + 1}",
                  f"model.parameter_tokens={tokens}", *UNSPLIT,
                  f"training.micro_batch_size={config.training.micro_batch_size}"],
    }  # fmt: skip
    for run, (name, *changes) in own.items():
        train(name, arguments.ranks, [*arguments.overrides, *changes, f"run.dir={literal(str(run))}"])
    for run in own:
        command("evaluate", str(run / "config.yml"), *UNSPLIT, "--output", str(run / "evaluation"))
    picture = arguments.folder / "loss.png"
    command("plot", str(small), str(grown), "--output", str(picture))
    writers = {
        "The small model writes, and so does the grown one before it is trained on": small,
        "The small model, trained on, writes": control,
        "The grown model writes": grown,
    }
    for words, run in writers.items():
        print(f"\n{words}:")
        command("generate", str(run), "--prompt", "The return value is", "--tokens", "60")
    print("\n" + table(summary(small), summary(control, after=small), summary(grown)))
    print(f"\nloss against tokens: {picture}\nall of it took {time.monotonic() - started:.0f} s")


def prepare(vocab_size: int) -> None:
    """Corpus, tokenizer and training data in data/demo, unless they are there already."""
    if not (DATA / "train.jsonl.zst").exists():
        command("build-demo-corpus", str(DATA))
    tokenizer = DATA / "tokenizer.json"
    if not tokenizer.exists():
        command("train-tokenizer", "--input", str(DATA / "train.jsonl.zst"), "--vocab-size", str(vocab_size),
                "--output", str(tokenizer))  # fmt: skip
    for split in ("train", "validation"):
        if not (DATA / f"{split}.idx").exists():
            command("preprocess", "--input", str(DATA / f"{split}.jsonl.zst"), "--tokenizer", str(tokenizer),
                    "--output-prefix", str(DATA / split))  # fmt: skip
        found = json.loads((DATA / f"{split}.json").read_text(encoding="utf-8"))["vocab_size"]
        if found > vocab_size:
            raise UserError(
                f"{DATA}: holds data of an older demo, with a vocabulary of {found:,}; this one's has {vocab_size:,}. "
                "Move the folder away and start again."
            )


def train(config: str, ranks: int, overrides: list[str]) -> None:
    """A run on `ranks` processes of this machine, under torchrun."""
    words = [
        "torchrun",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        "-m",
        "megatron_tf",
        "train",
        config,
        *overrides,
    ]
    run(words, [sys.executable, "-m", "torch.distributed.run", *words[1:]])


def command(*words: str) -> None:
    run(["megatron_tf", *words], [sys.executable, "-m", "megatron_tf", *words])


def run(shown: list[str], words: list[str]) -> None:
    """Prints a command as one would type it, and runs it; UserError when it fails."""
    print(f"\n$ {shlex.join(shown)}", flush=True)
    code = subprocess.run(words, env={"OMP_NUM_THREADS": "1", **os.environ}).returncode
    if code:
        raise UserError(f"this command ended with exit code {code}: {shlex.join(shown)}")


@dataclass(frozen=True)
class Summary:
    """What a run came to. `tokens` and `flops` count from the first step of the story."""

    name: str
    parameters: int
    tokens: int
    flops: float
    perplexity: float  # on all of the validation text
    tokens_per_second: float | None


def summary(run: Path, after: Path | None = None) -> Summary:
    """Of the finished `run`, which began with the weights of the run `after` and counts from there."""
    records = read_records(run)
    last = max((record for record in records if "flops" in record), key=lambda record: record["step"])
    speeds = sorted(r["perf/tokens_per_second"] for r in records if r.get("perf/tokens_per_second"))
    newest = max(run.glob("evaluation/*_perplexity*.json"), key=lambda file: file.stat().st_mtime)
    evaluated = json.loads(newest.read_text(encoding="utf-8"))
    before = summary(after) if after else None
    return Summary(
        run.name, evaluated["parameters"], last["tokens"] + (before.tokens if before else 0),
        last["flops"] + (before.flops if before else 0), evaluated["all"]["perplexity"],
        speeds[len(speeds) // 2] if speeds else None,
    )  # fmt: skip


def read_records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def table(small: Summary, control: Summary, grown: Summary) -> str:
    """Each model against the others; `control` is the small one, trained on for as long as the grown one."""
    rows = [("", "parameters", "tokens", "FLOPs", "perplexity", "tokens/s")]
    for label, run in (("small", small), ("small, trained on", control), ("grown, and trained on", grown)):
        speed = "" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}"
        perplexity = format_perplexity(run.perplexity)
        rows.append((label, f"{run.parameters:,}", f"{run.tokens:,}", f"{run.flops:.1e}", perplexity, speed))
    return text.table(rows)
