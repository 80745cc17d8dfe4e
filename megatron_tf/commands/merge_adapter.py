"""Merge an adapter of a TokenFormer into it:
`python tools/merge_adapter.py --base exports/150M --adapter runs/finetune/adapter --to exports/merged`.

The adapter's tokens are put behind those of the base, and τ stays: the result is a TokenFormer with more tokens, as
convert to-hf writes it, for transformers, vLLM and, by convert from-hf, training. It is compared with base and adapter
before it is written, and loaded with transformers before it gets its name. Needs no GPU, and memory for three models in
fp32.
"""

from __future__ import annotations

import argparse

from megatron_tf.arguments import path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=path, required=True, metavar="DIR", help="the exported TokenFormer's folder")
    parser.add_argument("--adapter", type=path, required=True, metavar="DIR", help="the adapter's folder, or the run's")
    parser.add_argument("--to", dest="target", type=path, required=True, metavar="DIR", help="the folder to write")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from megatron_tf.adapters.merge import merge_adapter
    from megatron_tf.adapters.summary import trained_adapter
    from megatron_tf.convert.huggingface.export import check_target

    check_target(arguments.target)
    adapter = trained_adapter(arguments.adapter)
    found = merge_adapter(arguments.base, adapter, arguments.target)
    print(f"from        {arguments.base}, with {adapter}")
    for kind, agreement in found.items():
        print(f"compared    on {kind}: {agreement}")
    size = sum(file.stat().st_size for file in arguments.target.iterdir())
    print(f"wrote {arguments.target}: {size:,} bytes")
    print(f"To train on, convert from-hf {arguments.target} --to a run's folder")
