"""Train a TokenFormer: `deepspeed launch/train.py CONFIG [section.field=value ...]`.

The same file runs under torchrun, under srun, and as plain python on one process. It resumes from the newest
complete checkpoint of run.dir by itself, and grows a smaller model when the configuration says so.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from megatron_tf.arguments import config_file
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.stages import load_stages
from megatron_tf.errors import STOPPED_EXIT_CODE, RunStopped
from megatron_tf.runtime.early_mistakes import told_to_all
from megatron_tf.runtime.environment import LaunchEnvironment, detect, one_message
from megatron_tf.runtime.stop_signals import StopSignals
from megatron_tf.streams import flush_or_discard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=config_file, help="YAML file, see configs/")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.field=value", help="replace values of the file"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show plan, layout, memory, start and the first batch, and write nothing"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    arguments = parser.parse_intermixed_args()
    environment = detect(os.environ)
    stop = StopSignals(tells=environment.rank == 0)
    try:
        with one_message(environment, stop.wait):
            with told_to_all(environment):
                stages = load_stages(arguments.config, arguments.overrides)
                from megatron_tf.telemetry.console import quiet_libraries

                quiet_libraries()
                from megatron_tf.training.preflight import preflight

                preflight(stages, environment)
            if arguments.dry_run:
                show_dry_run(stages, environment)
                return
            from megatron_tf.training.run import train

            train(stages, environment, stop)
        # A run is complete even if its last lines cannot be printed; train.log has them.
        flush_or_discard(sys.stdout)
    except RunStopped:
        if environment.rank == 0:
            raise
        sys.exit(STOPPED_EXIT_CODE)


def show_dry_run(stages: Sequence[RunConfig], environment: LaunchEnvironment) -> None:
    if environment.rank == 0:
        from megatron_tf.training.dry_run import dry_run

        for line in dry_run(stages, environment.world_size):
            print(line)
