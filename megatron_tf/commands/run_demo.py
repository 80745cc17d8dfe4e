"""The whole story on a bare machine: prepare real text, train, grow, go on training, and show what came of it.

Every step is one of the project's own commands and is printed before it runs. `make demo` calls this.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from megatron_tf.config.load import load_config
from megatron_tf.errors import UserError
from megatron_tf.telemetry.meters import format_perplexity

DATA = Path("data/demo")
STAGES = ("configs/tiny.yml", "configs/tiny_grow.yml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes to train on (default 2)")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="for both stages")
    arguments = parser.parse_intermixed_args()
    if not Path(STAGES[0]).is_file():
        raise UserError(f"{STAGES[0]} is not here: run the demo in the project's folder")
    started = time.monotonic()
    prepare()
    runs = [Path(load_config(stage, arguments.overrides).run.dir) for stage in STAGES]
    for stage, run in zip(STAGES, runs):
        shutil.rmtree(run, ignore_errors=True)  # a demo tells the whole story each time
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(arguments.ranks)]
        command([*launcher, "--master_port", free_port(), "launch/train.py", stage, *arguments.overrides])
    picture = runs[-1] / "loss.png"
    tool("plot_run.py", *map(str, runs), "--output", str(picture))
    print("\nA line of text from the grown model:")
    tool("generate_text.py", str(runs[-1]), "--prompt", "The return value is", "--tokens", "48")
    print("\n" + table(runs))
    print(f"\nloss against tokens: {picture}\nall of it took {time.monotonic() - started:.0f} s")


def prepare() -> None:
    """Corpus, tokenizer and training data in data/demo, unless they are there already."""
    if not (DATA / "train.jsonl.zst").exists():
        tool("build_demo_corpus.py", str(DATA))
    tokenizer = DATA / "tokenizer.json"
    if not tokenizer.exists():
        tool("train_tokenizer.py", "--input", str(DATA / "train.jsonl.zst"), "--vocab-size", "4096",
             "--output", str(tokenizer))  # fmt: skip
    for split in ("train", "validation"):
        if not (DATA / f"{split}.idx").exists():
            tool("preprocess_data.py", "--input", str(DATA / f"{split}.jsonl.zst"), "--tokenizer", str(tokenizer),
                 "--output-prefix", str(DATA / split), "--replace")  # fmt: skip


def tool(name: str, *arguments: str) -> None:
    command([sys.executable, f"tools/{name}", *arguments])


def command(words: list[str]) -> None:
    """Prints and runs a command; UserError when it fails."""
    print(f"\n$ {shlex.join([Path(words[0]).name, *words[1:]])}", flush=True)
    code = subprocess.run(words).returncode
    if code:
        raise UserError(f"this command ended with exit code {code}: {shlex.join(words)}")


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def table(runs: list[Path]) -> str:
    """Perplexity and speed at the ends of the two stages."""
    small, grown = ([json.loads(line) for line in (run / "metrics.jsonl").open()] for run in runs)
    rows = [("end of stage 1", small, -1), ("just after growth", grown, 0), ("end of stage 2", grown, -1)]
    lines = [f"{'':<18}  {'tokens':>10}  {'perplexity':>10}  {'tokens/s':>9}"]
    for label, records, which in rows:
        evaluation = [record for record in records if "eval/perplexity" in record][which]
        speeds = sorted(r["perf/tokens_per_second"] for r in records if "perf/tokens_per_second" in r)
        speed = "" if which == 0 else f"{speeds[len(speeds) // 2]:,.0f}"
        perplexity = format_perplexity(evaluation["eval/perplexity"])
        lines.append(f"{label:<18}  {evaluation['tokens']:>10,}  {perplexity:>10}  {speed:>9}")
    return "\n".join(lines)
