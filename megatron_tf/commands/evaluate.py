"""Evaluate a checkpoint: `deepspeed launch/evaluate.py CONFIG [section.field=value ...]`.

Perplexity and bits per byte on data.validation, or on any prepared data with --data; with --tasks the zero-shot tasks
of lm-evaluation-harness, and with --copying whether the model copies what it read; of a model of images, top-1 and
top-5 of every image. From the newest checkpoint of run.dir, or any other with --checkpoint. The same file runs under
torchrun, under srun, and as plain python on one process, on any layout: only weights are loaded, so a model needs a
fraction of the memory of its training.
"""

from __future__ import annotations

import argparse
import os

from megatron_tf.arguments import config_file, path, whole_number
from megatron_tf.config.load import load_config
from megatron_tf.evaluation.eval_data import TASK_FOLDER
from megatron_tf.runtime.early_mistakes import told_to_all
from megatron_tf.runtime.environment import detect, one_message

MOST_TOKENS = 10**15


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "config", type=config_file, help="YAML file of the run; the config.yml in its folder, or one of configs/"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.field=value",
        help="replace values of the file, such as parallel.tensor=2",
    )
    parser.add_argument(
        "--checkpoint", type=path, metavar="DIR", help="a checkpoint, or a run folder; default: run.dir"
    )
    parser.add_argument(
        "--data",
        type=path,
        action="append",
        default=[],
        metavar="PREFIX",
        help="prepared data to evaluate on; may be repeated; default: data.validation",
    )
    parser.add_argument(
        "--stride",
        type=whole_number(2**31),
        metavar="TOKENS",
        help="from one window of model.seq_length tokens to the next; smaller is slower and gives "
        "every token more context (default: model.seq_length)",
    )
    parser.add_argument(
        "--max-tokens", type=whole_number(MOST_TOKENS), metavar="N", help="read only the first N tokens of each data"
    )
    parser.add_argument(
        "--tasks",
        type=names,
        default=(),
        metavar="A,B,...",
        help="zero-shot tasks, instead of data.validation: lambada_openai, hellaswag, piqa, arc_easy, "
        "arc_challenge, winogrande (after tools/fetch_eval_data.py), or any other of the harness",
    )
    parser.add_argument(
        "--task-folder",
        type=path,
        default=TASK_FOLDER,
        metavar="DIR",
        help=f"task files that come before the harness's own (default: {TASK_FOLDER})",
    )
    parser.add_argument(
        "--limit", type=whole_number(2**31), metavar="N", help="only the first N documents of each task"
    )
    parser.add_argument(
        "--copying",
        action="store_true",
        help="instead of data.validation: the loss of random tokens, and of the same tokens again",
    )
    parser.add_argument("--per-class", action="store_true", help="also show the accuracy of each class of images")
    parser.add_argument(
        "--output", type=path, metavar="DIR", help="folder of the JSON files (default: run.dir/evaluation)"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_intermixed_args()


def names(text: str) -> tuple[str, ...]:
    found = tuple(name.strip() for name in text.split(",") if name.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} names no task")
    return tuple(dict.fromkeys(found))


def main() -> None:
    arguments = parse_arguments()
    environment = detect(os.environ)
    with one_message(environment):
        with told_to_all(environment):
            config = load_config(arguments.config, arguments.overrides)
        from megatron_tf.telemetry.console import quiet_libraries

        quiet_libraries()
        from megatron_tf.evaluation.loaded import EvaluationRequest
        from megatron_tf.evaluation.run import evaluate

        request = EvaluationRequest(
            arguments.checkpoint,
            tuple(map(str, arguments.data)),
            arguments.stride,
            arguments.max_tokens,
            arguments.tasks,
            arguments.task_folder,
            arguments.limit,
            arguments.copying,
            arguments.per_class,
            arguments.output,
        )
        evaluate(config, environment, request)
