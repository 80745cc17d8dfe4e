"""A plan in words, for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from megatron_tf.costs.banks import BOTTLENECK
from megatron_tf.telemetry.text import count_of, of_which_used, size, table


def report(plan: dict[str, Any]) -> str:
    """The text of `summary.plan`'s object, without a last newline."""
    gpu = plan["gpu"]
    parts = [
        f"{plan['gpus']:,} × {gpu['name']} ({gpu['memory_bytes'] / 1e9:.0f} GB, {gpu['bf16_flops'] / 1e12:.0f} "
        f"TFLOP/s, {gpu['per_node']} a node, {gpu['node_bandwidth'] / 1e9:g} GB/s within a node and "
        f"{gpu['network_bandwidth'] / 1e9:g} GB/s a GPU between nodes)"
    ]
    parts += [f"not valid     {problem}" for problem in plan["problems"]]
    for stage in plan["stages"]:
        parts += ["\n".join(lines) for lines in (list(_stage_lines(stage)), list(_layout_lines(stage))) if lines]
    if plan["chain"]:
        parts.append("\n".join(_chain_lines(plan)))
    if plan["advice"]:
        parts.append("\n".join(_advice_lines(plan["advice"], plan["stages"][0])))
    parts.append(
        "\n".join(
            [
                "Parameters, bytes sent and checkpoint sizes are counted; memory is within 10 % of what tensors took "
                "in runs on CPUs.",
                "Times, MFU, GPU-hours and energy are estimates from a roofline. They assume that",
                *(f"- {sentence}" for sentence in plan["assumptions"]),
            ]
        )
    )
    return "\n\n".join(parts)


def _stage_lines(stage: dict[str, Any]) -> Iterable[str]:
    count, used = stage["parameters"], stage["used_parameters"]
    yield f"{stage['name']}: {count:,} parameters{of_which_used(used, count)}"
    for problem in stage["problems"]:
        yield f"  not valid   {problem}"
    if stage["problems"]:
        return
    memory, step, run = stage["memory"], stage["step"], stage["run"]
    usable = stage["usable_memory"]
    verdict = "fits" if stage["fits"] else "DOES NOT FIT"
    micro_batches = stage["num_micro_batches"]
    plural = "micro batch" if micro_batches == 1 else "micro batches"
    yield f"  layout      {stage['layout']}, {micro_batches} {plural} a step: valid, {verdict}"
    yield (
        f"  memory      {size(memory['total'])} of {size(usable)} usable a rank ({stage['parameters_per_rank']:,} "
        f"parameters): weights {size(memory['weights'])}, gradients {size(memory['gradients'])}, optimizer "
        f"{size(memory['optimizer'])}, activations {size(memory['activations'])}"
    )
    if stage["banks"] and stage["banks"]["does_not_fit"]:
        yield f"              {_what_does_not_fit(stage['banks'], memory['total'], usable)}"
    policies = stage["activations_by_checkpointing"]
    yield f"              activations without checkpointing {size(policies['off'])}, with it {size(policies['on'])}"
    unit, length = stage["unit"], stage["unit_tokens"]
    yield (
        f"  step        {_duration(step['total'])}, {step['tokens'] / length:,.0f} {unit}, "
        f"{step['tokens_per_second'] / length:,.0f} {unit}/s, MFU {stage['mfu']:.1%}"
    )
    shares = ((name, step[key] / step["total"]) for name, key in _PARTS)
    yield f"              {', '.join(f'{name} {share:.1%}' for name, share in shares if share)}"
    if used < count and step["data"]:
        yield f"              {_exchange(stage['banks'], step['data'] / step['total'])}"
    sent = stage["sent_bytes"]
    yield f"  sent        a rank and step: {', '.join(f'{axis} {size(sent[axis])}' for axis in sent)}"
    yield (
        f"  run         {count_of(run['steps'], 'step')}, {run['tokens'] / length:,.0f} {unit}, {run['flops']:.2e} "
        f"FLOPs, {_duration(run['hours_without_failures'] * 3600)} of training"
    )
    if run["hours"] is None:
        yield "              with failures it would never end: save more often or to faster storage"
    else:
        yield (
            f"              {_duration(run['hours'] * 3600)} with checkpoints and failures: {_hours(run['gpu_hours'])} "
            f"GPU-hours, at most {max(run['megawatt_hours'], 0.1):,.1f} MWh without cooling"
        )
    if stage["growth"] is not None:
        yield f"  growth      {stage['growth']}"
    data = stage["data"]
    yield f"  data        {data['words'] if data else 'not on this machine, so passes over them are not known'}"
    for warning in data["warnings"] if data else ():
        yield f"  warning     {warning}"
    yield from _checkpoint_lines(stage["checkpoint"])


def _what_does_not_fit(banks: dict[str, Any], total: int, usable: float) -> str:
    """The sentence for BankCosts of which `does_not_fit` is true. `total`, `usable`: bytes of a rank."""
    words = (
        f"candidates are what does not fit: with gradients and optimizer states they take {size(banks['bytes'])} on "
        f"each rank, of {size(total)} in all and {size(usable)} usable"
    )
    remedies = banks["memory_remedies"]
    if not remedies:
        return f"{words}; more GPUs are needed, or fewer candidates"
    listed = ", or with ".join(
        f"{' '.join(own['overrides'])} ({size(own['memory_total'])}, {_duration(own['step_seconds'])} a step)"
        for own in remedies
    )
    return f"{words}; " + (f"it fits with {listed}" if remedies[0]["fits"] else f"none suffices alone: {listed}")


def _exchange(banks: dict[str, Any] | None, share: float) -> str:
    """The sentence on the exchange of gradients over data-parallel ranks, which takes `share` of a step."""
    words = f"gradients of all parameters are reduced for the work of those that are used: {share:.1%} of the step"
    if banks is None or not banks["is_bottleneck"]:
        return f"{words}; a larger training.global_batch_size makes it less"
    remedies = banks["exchange_remedies"]
    listed = ", or with ".join(
        f"{' '.join(own['overrides'])} ({own['data_share']:.1%} of {_duration(own['step_seconds'])})"
        for own in remedies
    )
    words = (
        f"{words}, so this exchange is its bottleneck; {banks['exchanged_share']:.1%} of them are those of candidates; "
        "it takes less with a larger training.global_batch_size"
    )
    if not remedies:
        return words
    if remedies[0]["data_share"] < BOTTLENECK:
        return f"{words}, or with {listed}"
    return f"{words}; less, but still {BOTTLENECK:.0%} or more, with {listed}"


_PARTS = (
    ("computing", "compute"),
    ("tensor-parallel communication", "tensor"),
    ("context-parallel communication", "context"),
    ("sending between stages", "pipeline"),
    ("pipeline bubble", "bubble"),
    ("data-parallel communication", "data"),
    ("optimizer", "update"),
)


def _checkpoint_lines(checkpoint: dict[str, Any]) -> Iterable[str]:
    yield (
        f"  checkpoint  {size(checkpoint['bytes'])}, written in {_duration(checkpoint['write'])}; training stands "
        f"still for {_duration(checkpoint['stall'])}"
    )
    steps = checkpoint["interval_steps"]
    if steps is None:
        yield "              without failures the fewer the better"
    else:
        yield (
            f"              a failure every {_duration(checkpoint['mean_between_failures'])}: least is lost, "
            f"{checkpoint['lost_share']:.2%} of the time, with checkpoint.interval_steps={steps}"
        )
    configured = checkpoint["configured_steps"]
    if configured != steps:
        when = "at the last step alone" if configured is None else f"every {count_of(configured, 'step')}"
        yield f"              as configured, {when}, {checkpoint['configured_lost_share']:.2%} is lost"


def _layout_lines(stage: dict[str, Any]) -> Iterable[str]:
    best = stage["best_layouts"]
    if not best and stage["problems"]:
        return  # they say why
    if not best:
        yield "  No layout of these GPUs fits this batch and their memory."
        return
    rows = [("  best layouts, by estimate", "step", "MFU", "bubble", "communication", "memory")]
    rows += [
        (
            f"  {row['layout']}",
            _duration(row["step_seconds"]),
            f"{row['mfu']:.1%}",
            f"{row['bubble_share']:.1%}",
            f"{row['communication_share']:.1%}",
            size(row["memory_total"]),
        )
        for row in best
    ]
    yield table(rows)
    yield f"  the first: {' '.join(best[0]['overrides'])}"


def _chain_lines(plan: dict[str, Any]) -> Iterable[str]:
    costs, unit = plan["chain"], plan["stages"][0]["unit"]
    length = plan["stages"][0]["unit_tokens"]
    yield "The chain, compared with training each size from scratch to the same loss (GPU-hours without failures)"
    head = ("  stage", "parameters", unit, "GPU-hours", "so far", f"from scratch: {unit}", "GPU-hours")
    rows = [(*head, "R, chain's FLOPs ×", "growth pays above κ")]
    for cost in costs:
        low, high = cost["scratch_tokens"]
        above = cost["break_even"]
        rows.append(
            (
                f"  {cost['name']}",
                f"{cost['parameters']:,}",
                _large(cost["tokens"] / length),
                _hours(cost["gpu_hours"]),
                _hours(cost["chain_gpu_hours"]),
                _joined(_large(low / length), _large(high / length)),
                _joined(*map(_hours, cost["scratch_gpu_hours"])),
                _span(cost["ratio"], ".2f"),
                "" if above is None else f"{above:.2f}",
            )
        )
    yield table(rows)
    hours, flops = (sum(cost[key] for cost in costs) for key in ("gpu_hours", "flops"))
    scratch, scratch_flops = (
        [sum(cost[key][end] for cost in costs) for end in (0, 1)] for key in ("scratch_gpu_hours", "scratch_flops")
    )
    yield (
        f"  all sizes: {_hours(hours)} GPU-hours by growing, {_joined(*map(_hours, scratch))} from scratch one by one; "
        f"FLOPs {flops:.3g}, and {_span(scratch_flops, '.3g')}"
    )
    if flops > costs[-1]["chain_flops"] * (1 + 1e-9):
        yield "  all sizes include the decay of each; a stage's own R leaves out the decays of the sizes before it"
    kappas = dict.fromkeys(_span(cost["kappa"], ".2f") for cost in costs if cost["kappa"] is not None)
    yield f"  R = φ + (1 - φ)·(c_s/c_l)/κ, φ = own {unit} / from scratch. κ, {unit} from scratch that one of the"
    yield f"  sizes before is worth, is {', '.join(kappas)}, {plan['kappa']}."


def _advice_lines(advice: dict[str, Any], stage: dict[str, Any]) -> Iterable[str]:
    """`stage`: any stage of the chain; all of them count their samples in the same unit."""
    unit, length = stage["unit"], stage["unit_tokens"]
    yield f"When to grow, for {advice['budget']:.3g} FLOPs, by {advice['source']}"
    if advice["law"] is None:
        yield f"  nothing can be said, as this has no law for these sizes: {advice['why_no_law']}"
        yield "  with more runs of such models in the study, megatron_tf study report FILE fits one"
        return
    static, share = advice["static"], advice["least_share"]
    yield f"  law         {advice['law']}"
    for beyond in advice["beyond"]:
        yield f"  warning     extrapolated: {beyond}"
    amount = f"{static['tokens'] / length:.3g} {unit}"
    yield f"  best size   {static['name']} from scratch, {amount}: loss {static['loss']:.4g}"
    for kappa, step in zip(advice["kappa"], advice["steps"]):
        if step is None:
            yield f"  κ {kappa:<9.2g} no growth: each costs more than its larger size from scratch"
            continue
        less = step["against_static"]
        verdict = "which does not reach the best size's loss"
        if less is not None:
            verdict = (
                f"the best size's loss at {less:.2f} of the FLOPs: growth {'pays' if less < 1 else 'does not pay'}"
            )
        yield (
            f"  κ {kappa:<9.2g} {step['small']} for {step['before'] / length:.3g} {unit}, then {step['large']} for "
            f"{step['after'] / length:.3g}: loss {step['loss']:.4g}, {verdict} (κ {step['kappa_of_loss']:.2g} if it "
            "only goes on from its loss)"
        )
    yield (
        f"  assumed     κ holds down to φ = {share:g} and does not fall with the {unit} before the growth; it does, "
        "where a small model is used up"
    )
    yield (
        f"  for scale   growth that only goes on from its loss, without more, costs {advice['ceiling']:.3f} of the "
        "best size at the least, by this law"
    )


def _span(ends: Sequence[float], form: str) -> str:
    return _joined(*(f"{end:{form}}" for end in ends))


def _joined(first: str, last: str) -> str:
    return first if first == last else f"{first} to {last}"


def _large(count: float) -> str:
    """A count of tokens or images in the largest unit that leaves 1 or more: "61.44 K", "96 B"."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= scale:
            return f"{count / scale:,.4g} {unit}"
    return f"{count:,.4g}"


def _hours(hours: float) -> str:
    """Whole hours, and of few hours the hundredths."""
    return f"{hours:,.0f}" if hours >= 10 or not hours else "< 0.01" if hours < 0.01 else f"{hours:.2f}"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * length or (unit == "s" and seconds >= 1):
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds * 1000:.3g} ms"
