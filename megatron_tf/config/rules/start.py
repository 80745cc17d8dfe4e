"""Rules of where a run starts from: training.init_from, growth and branch."""

from __future__ import annotations

import os
from collections.abc import Iterator

from megatron_tf.config.schema import RunConfig


def start_problems(config: RunConfig) -> Iterator[str]:
    if config.training.init_from is not None:
        if config.growth is not None:
            yield (
                f"training.init_from: {config.training.init_from}, but the weights are grown from growth.from "
                f"{config.growth.source}. Remove one of the two."
            )
        yield from _own_folder("training.init_from", config.training.init_from, config.run.dir, "other")
    if config.growth is not None:
        yield from _own_folder("growth.from", config.growth.source, config.run.dir, "smaller")
    if config.branch is not None:
        others = {"training.init_from": config.training.init_from, "growth": config.growth}
        for key in (key for key, value in others.items() if value is not None):
            yield (
                f"branch: the run goes on from {config.branch.source}, but {key} is given as well. Remove one of the "
                "two."
            )
        yield from _own_folder("branch.from", config.branch.source, config.run.dir, "other")


def _own_folder(key: str, source: str, run_dir: str, meant: str) -> Iterator[str]:
    """A problem when `source` is the run's own folder or its checkpoints, also through a link.

    `meant`: which kind of run to give instead, for the remedy.
    """
    own, place = os.path.realpath(run_dir), os.path.realpath(source)
    if place in (own, os.path.realpath(os.path.join(own, "checkpoints"))):
        yield (
            f"{key}: {source} is this run's own folder (run.dir {run_dir}). Give the {meant} run's folder, or another "
            "run.dir."
        )
