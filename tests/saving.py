"""A saver over an engine that only holds state."""

from __future__ import annotations

import torch

from megatron_tf.checkpoint.writer import Piece
from megatron_tf.config.run_plan import plan_run
from megatron_tf.config.sections.optimizer import Optimizer
from megatron_tf.engine.base import Age
from megatron_tf.engine.optimizer import Segment, SegmentedOptimizer
from megatron_tf.state.parameters import parameter_table
from megatron_tf.state.sources import InitialSource
from megatron_tf.telemetry.trackers import Trackers
from megatron_tf.training.running import Run
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
    """Weights and moments under the real optimizer, and nothing that computes."""

    def __init__(self, model):
        source = InitialSource(model, 1)
        self.scales = dict(source.scales)
        self.before_update = None
        self._numel = {name: spec.numel for name, spec in parameter_table(model).items()}
        buffers = {name: source.read(name, "weight", 0, n).requires_grad_() for name, n in self._numel.items()}
        self.optimizer = SegmentedOptimizer(buffers.values(), Optimizer(lr=1e-2))
        self.optimizer.bind(
            Segment(name, 0, len(buffer), buffer, 0, True, True, torch.tensor(0.0)) for name, buffer in buffers.items()
        )

    def update(self):
        """One step of training: every element of every state changes."""
        if self.before_update:
            self.before_update()
        for segment in self.optimizer.segments:
            segment.buffer.grad = torch.ones_like(segment.buffer)
        self.optimizer.step()

    def pieces(self):
        return [
            Piece(segment.name, state, segment.start, segment.stop, tensor)
            for segment in self.optimizer.segments
            for state, tensor in self.optimizer.states(segment).items()
        ]

    def ages(self):
        return [Age(segment.name, segment.start, segment.stop, int(segment.age)) for segment in self.optimizer.segments]

    def adam_steps(self):
        return {name: ((0, numel, self.optimizer.num_updates),) for name, numel in self._numel.items()}

    def check_replicas(self):
        pass

    def loss_scaler(self):
        return {}


def saver_of(config, folder, model=None, known_good=(), ids=None, **checkpoint):
    torch.manual_seed(0)
    run_config = config(run={"dir": str(folder)}, checkpoint=checkpoint, model=model or {})
    engine, console = StateOnly(run_config.model), Recorder()
    trackers = Trackers([], console.warning, ids)
    run = Run(run_config, plan_run(run_config, 1), 0, torch.device("cpu"), console)
    return Saver(run, engine, trackers, token="token", data={}, known_good=known_good), engine, console
