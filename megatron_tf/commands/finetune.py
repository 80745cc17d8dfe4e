"""Train an adapter of a frozen base model: `python launch/finetune.py configs/finetune/smollm2.yml [section.field=value
...]`.

Examples are JSON lines of prompt and answer, messages, or text. The same file runs under torchrun, deepspeed and srun,
data-parallel, and as plain python on one process. It resumes from the newest checkpoint of run.dir by itself.
"""

from __future__ import annotations

import argparse
import os
import sys

from megatron_tf.arguments import text_path
from megatron_tf.errors import STOPPED_EXIT_CODE, RunStopped
from megatron_tf.runtime.early_mistakes import told_to_all
from megatron_tf.runtime.environment import detect, one_message
from megatron_tf.runtime.stop_signals import StopSignals
from megatron_tf.shipped import find_finetuning


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=text_path, help="YAML file, or a name of configs/finetune/: smollm2")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.field=value",
                        help="replace values of the file")  # fmt: skip
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    arguments = parser.parse_intermixed_args()
    from megatron_tf.finetuning.section import load_finetune

    environment = detect(os.environ)
    stop = StopSignals(tells=environment.rank == 0)
    try:
        with one_message(environment, stop.wait):
            with told_to_all(environment):
                config = load_finetune(find_finetuning(arguments.config), arguments.overrides)
            from megatron_tf.finetuning.run import finetune
            from megatron_tf.telemetry.console import quiet_libraries

            quiet_libraries()
            finetune(config, environment, stop)
    except RunStopped:
        if environment.rank == 0:
            raise
        sys.exit(STOPPED_EXIT_CODE)
