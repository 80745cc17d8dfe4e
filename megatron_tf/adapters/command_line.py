"""Options and output that commands share which write a folder from a base and an adapter."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from megatron_tf.arguments import path


def parse_arguments(description: str | None, base: str) -> argparse.Namespace:
    """Parses --base, --adapter and --to. `base`: the help text of --base."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=path, required=True, metavar="DIR", help=base)
    parser.add_argument("--adapter", type=path, required=True, metavar="DIR", help="the adapter's folder, or the run's")
    parser.add_argument("--to", dest="target", type=path, required=True, metavar="DIR", help="the folder to write")
    return parser.parse_args()


def print_written(base: Path, adapter: Path, compared: Mapping[str, object], target: Path) -> None:
    """Prints what was read, how well each comparison agrees, and what was written."""
    print(f"from        {base}, with {adapter}")
    for what, agreement in compared.items():
        print(f"compared    {what}: {agreement}")
    print(f"wrote {target}: {sum(file.stat().st_size for file in target.iterdir()):,} bytes")
