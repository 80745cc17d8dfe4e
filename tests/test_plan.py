"""What is said about a run before it starts. The numbers of `describe` are compared in test_estimate.py."""

from __future__ import annotations

from megatron_tf.plan import evaluation_warning


def test_an_evaluation_within_the_validation_data_is_silent():
    assert evaluation_warning(64, 64) is None


def test_an_evaluation_that_goes_round_its_data():
    assert evaluation_warning(10_000, 40) == (
        "evaluation.samples: 10,000, but the validation data has 40 samples: each evaluation goes round it 250.0 times "
        "and takes as much longer. Set it to at most 40."
    )
    assert "has 1 sample:" in evaluation_warning(2, 1)
