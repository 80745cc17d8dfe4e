"""A saver over an engine that only holds state."""

from __future__ import annotations

import torch

from megatron_tf.checkpoint.source import InitialSource
from megatron_tf.checkpoint.writer import Piece
from megatron_tf.params import parameter_table
from megatron_tf.telemetry.trackers import Trackers
from megatron_tf.training.saving import Saver


class Recorder:
    """A console that keeps its lines."""

    def __init__(self):
        self.lines = []

    def info(self, text):
        self.lines.append(text)

    def warning(self, text):
        self.lines.append(f"warning: {text}")


class StateOnly:
    def __init__(self, model):
        source, table = InitialSource(model, 1), parameter_table(model)
        self.scales = dict(source.scales)
        self._pieces = [
            Piece(name, state, 0, spec.numel, source.read(name, state, 0, spec.numel))
            for name, spec in table.items()
            for state in ("weight", "exp_avg", "exp_avg_sq")
        ]
        self._numel = {name: spec.numel for name, spec in table.items()}

    def pieces(self):
        return list(self._pieces)

    def adam_steps(self):
        return {name: ((0, numel, 1),) for name, numel in self._numel.items()}

    def check_replicas(self):
        pass

    def loss_scaler(self):
        return {}


def saver_of(config, folder, model=None, **checkpoint):
    torch.manual_seed(0)
    run_config = config(run={"dir": str(folder)}, checkpoint=checkpoint, model=model or {})
    engine, console = StateOnly(run_config.model), Recorder()
    return Saver(run_config, engine, 0, 1, "token", {}, (), Trackers([], console.warning), console), engine, console
