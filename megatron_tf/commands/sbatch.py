"""The SLURM scripts that come with megatron_tf: `megatron_tf sbatch train > train.sbatch`, then submit that file."""

from __future__ import annotations

import argparse

from megatron_tf.shipped import slurm_scripts


def main() -> None:
    shipped = slurm_scripts()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=shipped, help="which script to print")
    print(shipped[parser.parse_args().name].read_text(encoding="utf-8"), end="")
