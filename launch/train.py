"""Train a TokenFormer: `deepspeed launch/train.py CONFIG [section.field=value ...]`.

The same file runs under torchrun, under srun, and as plain python on one process. It resumes from the newest
complete checkpoint of run.dir by itself, and grows a smaller model when the configuration says so.
"""

from __future__ import annotations

import argparse
import os
import sys

from megatron_tf.config.load import load_config
from megatron_tf.errors import UserError, run_command
from megatron_tf.parallel.environment import detect


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="replace values of the file")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    arguments = parser.parse_intermixed_args()
    environment = detect(os.environ)
    try:
        config = load_config(arguments.config, arguments.overrides)
        from megatron_tf.telemetry.console import quiet_libraries

        quiet_libraries()
        from megatron_tf.training.run import train

        train(config, environment)
    except UserError:
        if environment.rank == 0:
            raise
        sys.exit(2)  # every rank fails alike; one message is enough


if __name__ == "__main__":
    run_command(main)
