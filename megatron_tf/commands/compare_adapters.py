"""Compare what adapters learn, and forget, with as many parameters each:
`python tools/compare_adapters.py --base models/smollm2 --learn code.jsonl --keep prose.jsonl --to studies/adapters`.

LoRA is PEFT's, on all linear layers; the others are Pattention in parallel to whole modules, to the MLPs alone or to
each linear layer, the formula of ScalarLM's adapter, at the MLPs, and of an exported TokenFormer tokens appended to its
own. Each is trained on the one text, of which the last tenth of the examples is held out, with every rate of --rates
and one seed, and with its best rate with all seeds. A trial that has ended is not done again: the same command goes on
where it was cut off, and more rates, seeds or forms are added to it. With --then, what has learnt the one text then
learns a second one, at that rate: LoRA and Pattention trained on, a second LoRA with the first one frozen, and
Pattention grown by as many tokens with the old ones frozen. --plan says how long all that will take. Speed and kept
bytes are measured in interleaved rounds on the base itself, which needs memory for one more base
than there are forms; --rounds 0 leaves that out. Texts are JSON lines, as fine-tuning has them.
"""

from __future__ import annotations

import argparse

from megatron_tf.arguments import number, path, text_path, whole_number

FORMS = ("lora", "modules", "mlp", "linear", "mixture", "appended")
count = whole_number(2**31 - 1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=path, required=True, metavar="DIR", help="the base model's folder")
    parser.add_argument("--learn", type=text_path, required=True, metavar="FILE", help="text that is trained on")
    parser.add_argument("--keep", type=text_path, required=True, metavar="FILE", help="text that may be forgotten")
    parser.add_argument("--then", type=text_path, metavar="FILE", help="second text, learnt after the first")
    parser.add_argument("--to", dest="target", type=path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--forms", choices=FORMS, nargs="+", default=(), help="default: all that the base can have")
    parser.add_argument(
        "--rates",
        type=number(1e-9, 1e3),
        nargs="+",
        default=(5e-4, 1e-3, 2e-3, 5e-3, 1e-2),
        help="learning rates (default 5e-4 1e-3 2e-3 5e-3 1e-2)",
    )
    parser.add_argument("--seeds", type=count, default=3, help="of the best rate (default 3)")
    parser.add_argument("--rank", type=count, default=8, help="of LoRA (default 8)")
    parser.add_argument("--steps", type=count, default=200, help="of a trial (default 200)")
    parser.add_argument("--batch", type=count, default=8, help="sequences a step (default 8)")
    parser.add_argument("--micro-batch", type=count, default=2, help="sequences at once (default 2)")
    parser.add_argument("--seq-length", type=count, default=256, help="tokens a sequence (default 256)")
    parser.add_argument("--measured", type=count, default=64, help="sequences a loss is measured on (default 64)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the base (default fp32)")
    parser.add_argument("--no-packing", action="store_true", help="one example a sequence")
    parser.add_argument(
        "--rounds", type=whole_number(10**6, least=0), default=7, help="of the measurement of speed (default 7)"
    )
    parser.add_argument(
        "--plan", action="store_true", help="say how many trials are left and how long they take, and stop"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from megatron_tf.finetuning.comparison import Plan, compare_adapters
    from megatron_tf.finetuning.outlook import foresee
    from megatron_tf.finetuning.trial import Setting
    from megatron_tf.runtime.environment import detect
    from megatron_tf.runtime.joining import join_ranks, leave
    from megatron_tf.telemetry.console import quiet_libraries

    quiet_libraries()
    setting = Setting(
        arguments.base, arguments.precision, arguments.rank, arguments.steps, arguments.batch, arguments.micro_batch,
        arguments.seq_length, arguments.measured, not arguments.no_packing,
    )  # fmt: skip
    plan = Plan(setting, arguments.learn, arguments.keep, arguments.then, tuple(dict.fromkeys(arguments.forms)),
                tuple(sorted(set(arguments.rates))), arguments.seeds, arguments.rounds)  # fmt: skip
    device = join_ranks(detect({}), timeout_seconds=60)  # one process; steps and losses do not depend on their number
    try:
        if arguments.plan:
            return print(foresee(plan, arguments.target, device))
        text = compare_adapters(plan, arguments.target, device, lambda line: print(line, flush=True))
    finally:
        leave()
    print(f"\n{text}\nwrote {arguments.target}/results.json and results.md")
