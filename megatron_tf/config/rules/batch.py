"""Rules of the batch and of the length of a run."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_tf.config.nearest import divisors, either, multiples_near
from megatron_tf.config.schema import RunConfig


def batch_problems(config: RunConfig, data_parallel: int) -> Iterator[str]:
    global_size, micro = config.training.global_batch_size, config.training.micro_batch_size
    samples = micro * data_parallel
    if global_size % samples == 0:
        return
    remedy = f"Set it to {either(multiples_near(global_size, samples))}"
    if global_size % data_parallel == 0:
        micro_sizes = divisors(global_size // data_parallel)
        nearest = sorted(sorted(micro_sizes, key=lambda size: abs(size - micro))[:4])
        remedy += f", or training.micro_batch_size to {either(nearest)}"
    yield (
        f"training.global_batch_size: {global_size} is not a multiple of {samples} "
        f"(training.micro_batch_size {micro} × {data_parallel} data-parallel ranks). {remedy}."
    )


def length_problems(config: RunConfig) -> Iterator[str]:
    lengths = {name: getattr(config.training, name) for name in ("train_steps", "train_tokens", "train_samples")}
    given = [(name, value) for name, value in lengths.items() if value is not None]
    if not given:
        yield "training: neither train_steps nor train_tokens nor train_samples is given. Give one of them."
    if len(given) > 1:
        named, last = ", ".join(f"{name} ({value})" for name, value in given[:-1]), given[-1]
        nulls = either(f"training.{name}=null" for name, _ in given)
        yield (
            f"training: {'both ' if len(given) == 2 else ''}{named} and {last[0]} ({last[1]}) are given. Give one; "
            f"an override removes {'the other' if len(given) == 2 else 'others'} with {nulls}."
        )
