"""The whole story on a bare machine: prepare real text, train, grow, go on training, and show what came of it.

The text is novels in the public domain, fetched by package name, or this Python's own documentation where nothing can
be fetched. Every step is one of the project's own commands and is printed before it runs. In addition to the grown
model the small one is trained on for as many steps, as a control. Data go to data/demo, runs to --folder. Nothing is
deleted: runs that are complete are not repeated, and one that was cut off goes on; remove the folder for a new story.
`make demo` calls this.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tf.arguments import path, whole_number
from megatron_tf.config.load import load_config
from megatron_tf.config.schema import RunConfig
from megatron_tf.corpora.build import REPORT
from megatron_tf.data.summary import read_summary
from megatron_tf.errors import NOT_AS_WRITTEN, UserError
from megatron_tf.paths import literal
from megatron_tf.shipped import configurations
from megatron_tf.tasks.language_model.perplexity import format_perplexity
from megatron_tf.tasks.language_model.section import vocab_size_of
from megatron_tf.telemetry import text
from megatron_tf.telemetry.records import read_records

DATA = Path("data/demo")
NOVELS = DATA / "novels"
SMALL, GROWN = "demo", "demo_grow"
UNSPLIT = ("parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence=false")
FETCH_SECONDS = 180.0  # a package manager that has lost its network may wait for a very long time
# Hides all messages of torch and its launcher but errors; -v shows them.
QUIET = {"LOGLEVEL": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR"}
ANEW = "Move the run's folder away and start again."
NEXT = """What to do next:

megatron_tf generate {grown} --prompt "{prompt}" --tokens 200
megatron_tf inspect {grown} --diff {small}
megatron_tf convert to-hf {grown} --to exports/demo
megatron_tf preprocess --input my.txt --tokenizer data/demo/tokenizer.json --output-prefix data/mine
megatron_tf train demo run.dir=runs/mine data.train=data/mine
megatron_tf plan 124M --gpus 8"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=whole_number(256), default=2, help="processes to train on (default 2)")
    parser.add_argument(
        "--folder", type=path, default="runs/demo", metavar="DIR", help="of the runs (default runs/demo)"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show what the launcher says of itself as well")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="for all runs")
    arguments = parser.parse_intermixed_args()
    for name, value in () if arguments.verbose else QUIET.items():
        os.environ.setdefault(name, value)
    started = time.monotonic()
    config, bigger = (load_config(configurations()[name], arguments.overrides) for name in (SMALL, GROWN))
    prompt = prepare(vocab_size_of(config.model))
    small, control, grown, expanded = (arguments.folder / name for name in ("small", "control", "grown", "expanded"))
    own = {
        small: [SMALL],
        grown: [GROWN, f"growth.from={literal(str(small))}"],
        # The control goes on where the growth does, for as many steps and at the same rates.
        control: [SMALL, f"branch={{from: {literal(str(small))}, at: before_decay}}", *as_long_as(bigger, config)],
    }  # fmt: skip
    for run, (name, *changes) in own.items():
        train(name, arguments.ranks, [*arguments.overrides, *changes, f"run.dir={literal(str(run))}"])
    for run in own:
        command("evaluate", str(run / "config.yml"), *UNSPLIT, "--output", str(run / "evaluation"))
    picture = arguments.folder / "loss.png"
    command("plot", str(small), str(grown), "--output", str(picture))
    if not any(expanded.glob("checkpoints/step_*")):  # one that was cut off leaves folders
        command("expand", "--from", str(small), "--config", GROWN, "--to", str(expanded), *arguments.overrides,
                "growth.at=end")  # fmt: skip
    writers = {
        "The small model, before growth": small,
        "The grown model, before it is trained on": expanded,
        "The grown model, in the end": grown,
    }
    texts = {head: written(run, prompt) for head, run in writers.items()}
    print("\n" + table(summary(small), summary(control), summary(grown)))
    for head, text_of_model in texts.items():
        print(f"\n{head}, writes:\n\n{textwrap.indent(text_of_model.strip(), '    ')}")
    print(f"\nloss against tokens: {picture}\nall of it took {time.monotonic() - started:.0f} s\n")
    print(NEXT.format(grown=grown, small=small, prompt=prompt))


def as_long_as(grown: RunConfig, small: RunConfig) -> list[str]:
    """With these overrides, what goes on from before the decay of `small` has the steps and rates of `grown`."""
    decay, more = small.optimizer.schedule.decay_steps, grown.training.train_steps
    if small.training.train_steps is None or decay is None or more is None:
        raise UserError("the demo needs training.train_steps and optimizer.schedule.decay_steps. Do not replace them.")
    return [
        f"training.train_steps={small.training.train_steps - decay + more}",
        f"optimizer.lr={grown.optimizer.lr}",
        f"optimizer.schedule.decay_steps={grown.optimizer.schedule.decay_steps}",
    ]


def prepare(vocab_size: int) -> str:
    """Makes corpus, tokenizer and training data in data/demo, unless they are there. Returns a prompt for samples."""
    if not has_novels() and not (DATA / "train.jsonl.zst").exists():
        fetch_or_build()
    is_novels = has_novels()
    inputs = {
        split: str(NOVELS / split / "*.jsonl.zst" if is_novels else DATA / f"{split}.jsonl.zst")
        for split in ("train", "validation")
    }
    tokenizer = DATA / "tokenizer.json"
    if not tokenizer.exists():
        command(
            "train-tokenizer", "--input", inputs["train"], "--vocab-size", str(vocab_size), "--output", str(tokenizer)
        )
    for split in ("train", "validation"):
        if not (DATA / f"{split}.idx").exists():
            command("preprocess", "--input", inputs[split], "--tokenizer", str(tokenizer),
                    "--output-prefix", str(DATA / split))  # fmt: skip
        known = read_summary(DATA / split)
        if known is None or known.vocab_size != vocab_size:
            found = "no known vocabulary" if known is None else f"a vocabulary of {known.vocab_size:,}"
            raise UserError(
                f"{DATA}: holds data of an older demo, with {found}; this one's has {vocab_size:,}. Move the folder "
                "away and start again."
            )
    return "She was" if is_novels else "The return value is"


def has_novels() -> bool:
    """Whether the novels have been fetched completely: the report is written last, and a failed fetch has none."""
    return (NOVELS / REPORT).exists()


def fetch_or_build() -> None:
    """Fetches novels. If that fails, says so and builds a corpus from the documentation of this Python."""
    try:
        command("fetch-corpus", str(NOVELS), "--sources", "austen", seconds=FETCH_SECONDS)
    except UserError as reason:
        print(
            f"\nNo novels can be fetched here ({reason}). The demo goes on with the documentation of this Python's "
            "standard library."
        )
        command("build-demo-corpus", str(DATA))


def train(config: str, ranks: int, overrides: list[str]) -> None:
    """Trains on `ranks` processes of this machine, under torchrun."""
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


def command(*words: str, **options: Any) -> str:
    return run(["megatron_tf", *words], [sys.executable, "-m", "megatron_tf", *words], **options)


def written(model: Path, prompt: str) -> str:
    """A text generated by `model` after `prompt`, with the same seed for all models."""
    words = ("generate", str(model), "--prompt", prompt, "--tokens", "80", "--tokenizer", str(DATA / "tokenizer.json"))
    return command(*words, captured=True)


def run(shown: list[str], words: list[str], *, captured: bool = False, seconds: float | None = None) -> str:
    """Prints the command `shown`, as one would type it, and runs `words`. Returns its stdout if `captured`, else "".

    UserError when it fails or takes longer than `seconds`.
    """
    print(f"\n$ {shlex.join(shown)}", flush=True)
    try:
        done = subprocess.run(
            words,
            env={"OMP_NUM_THREADS": "1", **os.environ},
            stdout=subprocess.PIPE if captured else None,
            timeout=seconds,
            encoding="utf-8",
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"this command had not ended after {seconds:g} s: {shlex.join(shown)}") from None
    if done.returncode:
        raise UserError(f"this command ended with exit code {done.returncode}: {shlex.join(shown)}")
    return done.stdout or ""


@dataclass(frozen=True)
class Summary:
    """The result of a run. `tokens` and `flops` count from the first step of the demo, earlier runs included."""

    name: str
    parameters: int
    tokens: int
    flops: float
    perplexity: float  # on all of the validation text
    tokens_per_second: float | None


def summary(run: Path) -> Summary:
    """The summary of the finished `run`."""
    records = read_records(run)
    counted = [record for record in records if record.get("flops") is not None]
    if not counted:
        raise UserError(f"{run / 'metrics.jsonl'}: holds no record of a finished run. {ANEW}")
    last = max(counted, key=lambda record: record["step"])
    speeds = sorted(r["perf/tokens_per_second"] for r in records if r.get("perf/tokens_per_second"))
    parameters, perplexity = read_evaluation(run)
    speed = speeds[len(speeds) // 2] if speeds else None
    return Summary(run.name, parameters, last["tokens"], last["flops"], perplexity, speed)


def read_evaluation(run: Path) -> tuple[int, float]:
    """(Parameters, perplexity on all of the validation text) of the newest evaluation of `run`."""
    newest = max(run.glob("evaluation/*_perplexity*.json"), key=lambda file: file.stat().st_mtime)
    try:
        evaluated = json.loads(newest.read_bytes())
        return int(evaluated["parameters"]), float(evaluated["all"]["perplexity"])
    except NOT_AS_WRITTEN:
        raise UserError(f"{newest}: is not the result of an evaluation. {ANEW}") from None


def table(small: Summary, control: Summary, grown: Summary) -> str:
    """A table of the three models. `control`: the small model, trained further for as long as the grown one."""
    rows = [("", "parameters", "tokens", "FLOPs", "perplexity", "tokens/s")]
    for label, run in (("small", small), ("small, trained on", control), ("grown, and trained on", grown)):
        speed = "" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}"
        perplexity = format_perplexity(run.perplexity)
        rows.append((label, f"{run.parameters:,}", f"{run.tokens:,}", f"{run.flops:.1e}", perplexity, speed))
    return text.table(rows)
