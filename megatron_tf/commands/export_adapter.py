"""Write a base model and an adapter as one folder that transformers loads:
`python tools/export_adapter.py --base models/smollm2 --adapter adapters/first --to exports/adapted`.

The folder holds the base's weights, the adapter's tokens, the tokenizer, and the code of the branches, which needs
torch and transformers alone. It is loaded with transformers and compared with base and adapter, also in generation with
and without caches, before it gets its name. Needs no GPU, and memory for two models in fp32.
"""

from __future__ import annotations

import argparse

from megatron_tf.arguments import path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=path, required=True, metavar="DIR", help="the base model's folder")
    parser.add_argument("--adapter", type=path, required=True, metavar="DIR", help="the adapter's folder, or the run's")
    parser.add_argument("--to", dest="target", type=path, required=True, metavar="DIR", help="the folder to write")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from megatron_tf.adapters.export import export_adapter
    from megatron_tf.adapters.folder import check_new_folder
    from megatron_tf.adapters.summary import trained_adapter

    check_new_folder(arguments.target)
    adapter = trained_adapter(arguments.adapter)
    found = export_adapter(arguments.base, adapter, arguments.target)
    print(f"from        {arguments.base}, with {adapter}")
    for kind, agreement in found.items():
        print(f"compared    with transformers on {kind}: {agreement}")
    print(f"wrote {arguments.target}: {sum(file.stat().st_size for file in arguments.target.iterdir()):,} bytes")
