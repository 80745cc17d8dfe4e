"""The training loop works with any engine: one of a screenful of plain torch trains, evaluates, saves, resumes, grows.

It takes DeepSpeed's place on one process, and must give the same losses and the same checkpoints.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from prepared import write_tokens
from tiny import run_config
from torch.nn import functional as F

from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.checkpoint.writer import Piece
from megatron_tf.config.topology import Topology
from megatron_tf.engine.base import Age, Engine, Evaluated, StepResult
from megatron_tf.engine.optimizer import Segment, SegmentedOptimizer
from megatron_tf.engine.schedule import learning_rate
from megatron_tf.engine.step_clock import StepClock
from megatron_tf.model.layers import TensorParallel
from megatron_tf.model.stage import build_stage
from megatron_tf.runtime.environment import detect
from megatron_tf.runtime.local_ranks import start_ranks
from megatron_tf.state.parameters import parameter_table
from megatron_tf.tasks.classes import IGNORED


class PlainEngine:
    """One process, fp32."""

    def __init__(self, config, model, plan, topology, tensor, source, first_new=None, document_ends=(), new_layers=()):
        assert topology == Topology()
        self.plan, self.clock, self.steps_skipped = plan, StepClock(), 0
        self._adam, self._scales, self._clip = config.optimizer, dict(source.scales), config.training.gradient_clipping
        table = parameter_table(model)
        self._stage = build_stage(model, self._scales, topology, 0, TensorParallel(), document_ends)
        buffers = dict(self._stage.named_parameters())
        self._optimizer = SegmentedOptimizer(buffers.values(), config.optimizer)
        self._loaded = {name: source.adam_steps(name, 0, spec.numel) for name, spec in table.items()}
        self._optimizer.bind(
            Segment(name, start, stop, buffers[name], start, True, spec.decayed, torch.tensor(float(updates)))
            for name, spec in table.items()
            for start, stop, updates in self._loaded[name]
        )
        with torch.no_grad():
            for piece in self.pieces():
                source.read_into(piece.name, piece.state, piece.start, piece.tensor)

    @property
    def before_update(self):
        return self._optimizer.before_update

    @before_update.setter
    def before_update(self, call):
        self._optimizer.before_update = call

    @property
    def on_gradients(self):
        return self._optimizer.observe

    @on_gradients.setter
    def on_gradients(self, call):
        self._optimizer.observe = call

    @property
    def scales(self):
        return dict(self._scales)

    @property
    def reads_data(self):
        return True

    def train_step(self, step, batches, lr_factor=1.0):
        lr = lr_factor * learning_rate(self.plan.schedule_position(step), self._adam, self.plan.schedule_steps)
        self._optimizer.param_groups[0]["lr"] = lr
        total = torch.tensor(0.0)
        for (ids, labels), _ in zip(batches, range(self.plan.num_micro_batches)):
            logits = self._stage.infer(ids).transpose(0, 1)
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten()) / self.plan.num_micro_batches
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self._stage.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return StepResult(total, norm, lr, skipped=False)

    def nonfinite_gradients(self):
        return []

    @torch.no_grad()
    def evaluate_groups(self, batches, groups, num_groups):
        sums, counts = torch.zeros(num_groups), torch.zeros(num_groups)
        samples = iter(groups)
        for ids, labels in batches:
            losses = F.cross_entropy(
                self._stage.infer(ids).permute(1, 2, 0), labels, ignore_index=IGNORED, reduction="none"
            )
            for row, label_row in zip(losses, labels):
                group = next(samples)
                sums[group] += row.sum()
                counts[group] += (label_row != IGNORED).sum()
        means = [float(loss / count) if count else None for loss, count in zip(sums, counts)]
        return Evaluated(float(sums.sum() / counts.sum()), means, {})

    def stage(self):
        return self._stage

    def pieces(self):
        return [
            Piece(segment.name, state, segment.start, segment.stop, tensor)
            for segment in self._optimizer.segments
            for state, tensor in self._optimizer.states(segment).items()
        ]

    def ages(self):
        return [Age(s.name, s.start, s.stop, int(s.age)) for s in self._optimizer.segments]

    def adam_steps(self):
        done = self._optimizer.num_updates
        return {
            name: tuple((start, stop, steps + done) for start, stop, steps in ranges)
            for name, ranges in self._loaded.items()
        }

    def check_replicas(self):
        pass

    def loss_scaler(self):
        return {}

    def load_loss_scaler(self, state):
        pass

    def close(self):
        pass


_COMPLETE: Engine = PlainEngine.__new__(PlainEngine)


def _train(rank: int, plain: bool, *configs) -> None:
    """Runs one after the other in a process of their own."""
    from megatron_tf.engine.deepspeed import engine
    from megatron_tf.runtime.stop_signals import StopSignals
    from megatron_tf.training.run import train

    torch.set_num_threads(1)
    if plain:
        engine.DeepSpeedEngine = PlainEngine
    for config in configs:
        train([config], detect({}), StopSignals())


def losses(run: Path) -> list[tuple[int, str, float]]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], key, r[key]) for r in records for key in ("train/loss", "eval/loss") if key in r]


@pytest.mark.slow
def test_it_trains_resumes_and_grows_like_deepspeed(tmp_path):
    write_tokens(tmp_path / "tokens")
    write_tokens(tmp_path / "held_out", documents=39)
    common = {
        "data": {"train": ({"path": str(tmp_path / "tokens")},), "validation": ({"path": str(tmp_path / "held_out")},)},
        "evaluation": {"interval_steps": 3, "samples": 8},
        "checkpoint": {"interval_steps": 3},
        "logging": {"interval_steps": 1},
    }

    def runs(name: str):
        first, second = (
            run_config(run={"dir": str(tmp_path / name / "small")}, training={"train_steps": steps}, **common)
            for steps in (4, 6)
        )
        grown = run_config(
            run={"dir": str(tmp_path / name / "grown")}, training={"train_steps": 3}, **common,
            model={"parameter_tokens": {"qkv": 20, "proj": 11, "ffn": 51}},
            growth={"source": str(tmp_path / name / "small")},
        )  # fmt: skip
        return first, second, grown

    for name in ("plain", "deepspeed"):
        start_ranks(_train, 1, name == "plain", *runs(name))
    for run in ("small", "grown"):
        found, expected = (losses(tmp_path / name / run) for name in ("plain", "deepspeed"))
        assert [row[:2] for row in found] == [row[:2] for row in expected]
        assert [row[2] for row in found] == pytest.approx([row[2] for row in expected], rel=1e-5)
    ours, theirs = (
        open_checkpoint(tmp_path / name / "grown" / "checkpoints" / "step_00000003").index
        for name in ("plain", "deepspeed")
    )
    assert ours.adam_steps == theirs.adam_steps and ours.scales == theirs.scales
    assert ours.growth_history[0]["loss_after"] == pytest.approx(theirs.growth_history[0]["loss_before"], rel=1e-5)
