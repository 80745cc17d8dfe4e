"""The SLURM scripts that come with megatron_tf: `megatron_tf sbatch train > train.sbatch`, then submit that file."""

from __future__ import annotations

import argparse
import sys

from megatron_tf.shipped import slurm_scripts


def main() -> None:
    shipped = slurm_scripts()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=shipped, help="which script to print")
    script = shipped[parser.parse_args().name]
    sys.stdout.buffer.write(script.read_bytes())  # the same bytes, whatever the locale's encoding
