"""Give a trained adapter more parameter tokens, or fewer:
`python tools/grow_adapter.py --from adapters/first --tokens 128 --to adapters/grown`
`python tools/grow_adapter.py --from adapters/grown --tokens 64 --shrink --to adapters/back`.

zero_key, gram and split keep what was learnt: the outputs of every branch before and after are compared, and with
--base the logits of the whole model, before anything is published. With --freeze-old only the new tokens are trained
from there on, and --shrink to the number of the old ones gives the adapter back as it was, to the last bit. Otherwise
--shrink drops the tokens that contribute least. --method split copies the tokens to candidates: a position uses as many
as before, and --shrink takes candidates away again. The optimizer's state is not carried over: begin with a warm-up.
Needs no GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tf.arguments import options_for, path, whole_number
from megatron_tf.errors import UserError
from megatron_tf.growth.methods import METHODS_OF_ADAPTERS, PRESERVING, SPLIT
from megatron_tf.telemetry.text import count_of

if TYPE_CHECKING:
    from megatron_tf.convert.agreement import Agreement


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--from", dest="source", type=path, required=True, metavar="DIR", help="the adapter's folder, or the run's"
    )
    parser.add_argument(
        "--tokens", type=whole_number(2**31 - 1), required=True, metavar="N", help="of each branch, afterwards"
    )
    parser.add_argument(
        "--method", choices=METHODS_OF_ADAPTERS, help="of growth (default zero_key); random changes the function"
    )
    parser.add_argument(
        "--group-size",
        type=whole_number(2**31 - 1),
        metavar="G",
        help="of split: tokens of a candidate (default 16, or less)",
    )
    parser.add_argument("--freeze-old", action="store_true", help="train only the new tokens from there on")
    parser.add_argument("--shrink", action="store_true", help="fewer tokens instead of more")
    parser.add_argument(
        "--seed", type=whole_number(2**31 - 1, least=0), default=0, help="of the new tokens (default 0)"
    )
    parser.add_argument("--base", type=path, metavar="DIR", help="the base model: compares logits of the whole too")
    parser.add_argument("--to", dest="target", type=path, required=True, metavar="DIR", help="the new adapter's folder")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from megatron_tf.adapters.folder import check_absent, read_adapter, write_adapter
    from megatron_tf.adapters.growth import check_growth, compare, grow_adapter, shrink_adapter
    from megatron_tf.adapters.summary import scale_text, trained_adapter

    if arguments.shrink and (arguments.method or arguments.freeze_old or arguments.group_size):
        raise UserError(
            "--shrink: takes tokens away, and --method, --freeze-old and --group-size are of growth. Leave them out."
        )
    check_absent(arguments.target)
    source = trained_adapter(arguments.source)
    old = read_adapter(source)
    method = arguments.method or "zero_key"
    if arguments.shrink:
        with options_for(num_tokens="--tokens"):
            new = shrink_adapter(old, arguments.tokens, seed=arguments.seed)
        found, method = compare(old, new), "shrink"
    else:
        with options_for(num_tokens="--tokens", group_size="--group-size", freeze_old="--freeze-old"):
            new = grow_adapter(
                old, arguments.tokens, method, freeze_old=arguments.freeze_old, group_size=arguments.group_size,
                seed=arguments.seed,
            )  # fmt: skip
        found = check_growth(old, new, method)
    print(f"from        {source}: {count_of(len(old.branches), 'branch')} of {old.config['num_tokens']:,} tokens")
    tokens = f"{new.config['num_tokens']:,} tokens, {new.config['frozen_tokens']:,} frozen{_choice(new.config)}"
    print(f"to          {arguments.target}: {tokens}")
    scales = dict.fromkeys(scale_text(one.config) for one in (old, new))
    print(f"method      {method}; τ {' -> '.join(scales)}")
    print(f"compared    branch by branch, on random inputs: {found}")
    if arguments.dry_run:
        return print("\ndry run: nothing is written")

    def verify(folder: Path) -> None:
        if arguments.base is not None:
            print(f"compared    on {arguments.base}: {on_base(arguments.base, source, folder, method)}")

    size = write_adapter(arguments.target, new, verify)
    print(f"wrote {arguments.target}: {size:,} bytes")


def _choice(config: Mapping[str, Any]) -> str:
    if "candidates" not in config:
        return ""
    return f", of which a position uses {config['num_tokens'] // config['candidates']:,}"


def on_base(base: Path, before: Path, after: Path, method: str) -> Agreement:
    """The agreement of the base model's logits with the adapters `before` and `after`.

    UserError when they differ although `method` preserves the function.
    """
    from megatron_tf.adapters.loading import load_adapted, load_base, random_logits
    from megatron_tf.convert.agreement import agreement

    model = load_adapted(load_base(base), {"before": before, "after": after})
    expected = random_logits(model)
    model.set_adapter("after")
    found = agreement(random_logits(model), expected)
    if method in (*PRESERVING, SPLIT) and not found.holds:
        raise UserError(f"the growth by {method} changes the model's function: {found}. Nothing was written")
    return found
