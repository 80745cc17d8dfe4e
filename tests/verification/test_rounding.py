"""What rounding explains is no fault, at any size; what it does not explain is one."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny import run_config

from megatron_tf.config.topology import Topology
from megatron_tf.engine import segmented
from megatron_tf.errors import exit_now
from megatron_tf.model import row_passes
from megatron_tf.model.layers import TensorParallel
from megatron_tf.model.projection import Pattention
from megatron_tf.parallel import collectives
from megatron_tf.runtime.local_ranks import start_ranks
from megatron_tf.verification import layout as check
from megatron_tf.verification.layout import Layout, Trace, compare, reference
from megatron_tf.verification.rounding import equal_limits, exact_and_limits, judge, rounding_limits

pattention = importlib.import_module("megatron_tf.model.pattention")  # the package has a function of that name
STEPS = 3
SEQUENCE, PIPELINE, DATA = Layout(Topology(2, 1, 1), True), Layout(Topology(1, 2, 1)), Layout(Topology(1, 1, 2))
SMALL = {"hidden_size": 16, "rotary_fraction": 0.5, "seq_length": 4}
# Each is off by more than 1e-5 somewhere, or may be: by cancellation, by rows of scores that nearly vanish, by depth.
MODELS = {
    "softmax": {"activation": "softmax"},
    "four tokens": {"parameter_tokens": {"qkv": 4, "proj": 4, "ffn": 4}, "seq_length": 8},
    "short and narrow": SMALL,
    "one position": {"seq_length": 1, "vocab_size": 8},
    "deep": {**SMALL, "num_layers": 8},
    "transformer": {"architecture": "transformer", "parameter_tokens": None, "ffn_hidden_size": 37},
}


def planned_runs():
    """(model or fault, configuration, layout, fault or None)."""
    for name in MODELS:
        for layout in (SEQUENCE, PIPELINE, DATA) if name == "softmax" else (SEQUENCE,):
            yield true_run(name, layout)
    for fault in FAULTS:
        yield fault, run_config(training={"global_batch_size": 4}), SEQUENCE, fault


def further_runs():
    """Likewise: every model at all layouts, and of another seed."""
    for name in MODELS:
        for seed, layout in ((1, SEQUENCE), (1, PIPELINE), (1, DATA), (2, SEQUENCE)):
            yield true_run(name, layout, seed)


def true_run(name, layout, seed=1):
    if name == "one position" and layout.sequence:
        # sequences are split over the tensor ranks
        layout = Layout(layout.topology)
    training = {"global_batch_size": 4, "micro_batch_size": 1}
    return name, run_config(model=MODELS[name], run={"seed": seed}, training=training), layout, None


def no_sum_of_norms(patch):
    begin = row_passes._begin_row_statistic
    alone = {"group": pattention.SINGLE}
    patch.setattr(row_passes, "_begin_row_statistic", lambda scores, layer: begin(scores, layer._replace(**alone)))


def no_sum_of_totals(patch):
    """Patched in the backward pass alone: the forward's norms go through the function as well."""
    backward = pattention._Pattention.backward

    def faulty(ctx, *grads):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(row_passes, "begin_all_reduce", lambda total, group: lambda: total)
            return backward(ctx, *grads)

    patch.setattr(pattention._Pattention, "backward", staticmethod(faulty))


def no_sum_of_input_gradients(patch):
    patch.setattr(collectives._GatherFrom, "backward", staticmethod(_own_part))


def _own_part(ctx, grad):
    return grad.chunk(ctx.group.size, ctx.dim)[ctx.group.rank].contiguous(), None, None, None


def no_sum_of_the_norms_gradient(patch):
    patch.setattr(TensorParallel, "replicated", lambda self, weight: weight)


def scale_of_one_rank(patch):
    partial = Pattention.__init__

    def faulty(self, *arguments, **options):
        partial(self, *arguments, **options)
        self.scale *= 1 + 1e-3 * self.group.rank

    patch.setattr(Pattention, "__init__", faulty)


def learning_rate(patch):
    right = segmented.learning_rate
    patch.setattr(segmented, "learning_rate", lambda *arguments: 1.02 * right(*arguments))


FAULTS = {fault.__name__: fault for fault in (
    no_sum_of_norms, no_sum_of_totals, no_sum_of_input_gradients, no_sum_of_the_norms_gradient, scale_of_one_rank,
    learning_rate,
)}  # fmt: skip


def _ranks(rank, runs, steps, folder):
    with check.joined([config for config, *_ in runs], rank, 2, folder):
        for number, (config, layout, fault) in enumerate(runs):
            with pytest.MonkeyPatch.context() as patch:
                if fault:
                    FAULTS[fault](patch)
                check._run(layout.apply(config), layout.topology, rank, steps, Path(folder), number)
            dist.barrier()
    exit_now()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return traced(list(planned_runs()), tmp_path_factory.mktemp("ranks"))


def traced(planned, folder, steps=STEPS):
    """(model or fault, layout, its trace, exact trace, limits), all under one start of ranks."""
    start_ranks(_ranks, 2, [run[1:] for run in planned], steps, str(folder))
    known, found = {}, []
    for number, (name, config, layout, _) in enumerate(planned):
        key = config.model_dump_json()
        if key not in known:
            known[key] = exact_and_limits(config, steps)
        found.append((name, layout, check._collect(folder, number, 2, config), *known[key]))
    return found


def assert_agreement(runs):
    verdicts = [
        (name, str(layout), judge(trace, exact, limits))
        for name, layout, trace, exact, limits in runs
        if name in MODELS
    ]
    assert [told for told in verdicts if not told[-1].agrees] == []
    # a limit that did not know the model would call some of them wrong, and none is so far that it says nothing
    errors = [error for *_, v in verdicts for error in (v.loss, v.grad_norm, v.gradient, v.validation)]
    assert max(error.value for error in errors) > 1e-5
    assert max(verdict.loss.limit for *_, verdict in verdicts) < 1e-4


@pytest.mark.slow
def test_true_layouts_agree(runs):
    assert_agreement(runs)


@pytest.mark.slow
@pytest.mark.scale
def test_every_model_agrees_at_each_layout(tmp_path):
    assert_agreement(traced(list(further_runs()), tmp_path, steps=2 * STEPS))


@pytest.mark.slow
def test_faults_are_found(runs):
    verdicts = {name: judge(trace, exact, limits) for name, _, trace, exact, limits in runs if name in FAULTS}
    assert {name: verdict for name, verdict in verdicts.items() if verdict.agrees} == {}
    worst = {name: max(v.loss.share, v.grad_norm.share, v.gradient.share) for name, v in verdicts.items()}
    assert min(worst.values()) > 10, worst
    assert verdicts["no_sum_of_the_norms_gradient"].parameter.startswith("final_norm.")


def trace(losses=(1.0, 1.0), norms=(1.0, 1.0), gradient=(1.0, 2.0), reports=(), validation=1.0) -> Trace:
    gradients = {"a": torch.tensor(gradient, dtype=torch.float64)}
    return Trace(list(losses), list(norms), gradients, list(reports), validation)


def test_limits_are_what_rounding_did_and_what_a_sum_of_so_many_terms_does():
    rounded = [trace((1 + 1e-5, 1.0)), trace((1.0, 1 + 3e-5), norms=(1.0, 1 - 1e-4), gradient=(1.0, 2.0 + 1e-3))]
    limits = rounding_limits(trace(), rounded, 100)
    floor = 10 * 10 * 2**-24
    assert limits.losses == pytest.approx([1e-4 + floor, 3e-4 + floor])
    assert limits.grad_norms == pytest.approx([floor, 1e-3 + floor])
    assert limits.gradients["a"] == pytest.approx(1e-2 / math.sqrt(5) + floor)


def test_what_was_off_by_much_once_may_be_so_again():
    limits = rounding_limits(trace((1.0, 1.0, 1.0)), [trace((1.0, 1 + 1e-3, 1.0))], 1)
    assert limits.losses == pytest.approx([0, 1e-2, 1e-2], abs=1e-5)
    two_reports = trace(reports=(1.0, 5.0, 1.0, 5.0))
    limits = rounding_limits(two_reports, [trace(reports=(1.0, 5.05, 1.0, 5.0))], 1)
    assert limits.reports == pytest.approx([0, 0.1, 0, 0.1], abs=1e-5)


def test_the_error_nearest_to_its_limit_is_told():
    exact = trace()
    limits = rounding_limits(exact, [trace((1 + 1e-3, 1.0), (1 + 1e-6, 1.0))], 1)
    verdict = judge(trace((1.001, 1.0), (1.0, 1 + 1e-4)), exact, limits)
    assert verdict.loss.share == pytest.approx(0.1, rel=0.01) and verdict.loss.value == pytest.approx(1e-3)
    assert verdict.grad_norm.share > 9 and not verdict.agrees and verdict.gradient.value == 0
    assert judge(exact, exact, equal_limits(exact, 1e-30)).agrees
    assert not judge(trace(gradient=(1.0, 2.0 + 1e-9)), exact, equal_limits(exact, 1e-30)).agrees


def test_an_evaluation_that_is_off_by_more_than_rounding_does_not_agree():
    exact = trace()
    limits = rounding_limits(exact, [trace(validation=1 + 1e-6)], 1)
    assert judge(trace(validation=1 + 9e-6), exact, limits).agrees
    verdict = judge(trace(validation=1 + 2e-5), exact, limits)
    assert not verdict.agrees and verdict.validation.value == pytest.approx(2e-5) and verdict.loss.value == 0


def test_what_is_no_number_never_agrees():
    exact, nan = trace(), math.nan
    limits = equal_limits(exact, 1e9)
    for wrong in (trace((nan, 1.0)), trace(norms=(1.0, nan)), trace(gradient=(nan, 1.0)), trace(validation=nan)):
        assert not judge(wrong, exact, limits).agrees


def test_a_gradient_of_zero_has_a_limit_too():
    exact = trace(gradient=(0.0, 0.0))
    limits = rounding_limits(exact, [trace(gradient=(0.0, 1e-9))], 16)
    assert judge(trace(gradient=(3e-9, 0.0)), exact, limits).agrees
    assert not judge(trace(gradient=(2e-8, 0.0)), exact, limits).agrees


def test_nudged_weights_are_the_next_numbers(config):
    plain, nudged = (reference(config(), 1, nudged=value) for value in (False, True))
    difference = compare(nudged, plain)
    assert 0 < difference.gradient < 1e-5 and difference.loss < 1e-5
