from __future__ import annotations

from types import SimpleNamespace

from megatron_tf.data.blend import Shares
from megatron_tf.tasks.image_classification.data import _samples_for_all


def test_an_evaluation_of_so_many_samples_has_every_image():
    """Of one source as many as there are; several are dealt by weight, so the longest takes more."""

    def needed(*weights: float) -> int:
        sources = [SimpleNamespace(weight=weight) for weight in weights]
        config = SimpleNamespace(data=SimpleNamespace(validation=sources))
        return _samples_for_all(config, [range(100), range(900)][: len(weights)])

    assert needed(3.0) == 100
    for weights in ((1.0, 1.0), (2.0, 5.0)):
        shares, samples = Shares(list(weights), seed=4), needed(*weights)
        taken = [shares.locate(number)[0] for number in range(samples)]
        assert taken.count(0) >= 100 and taken.count(1) >= 900 and samples < 1.1 * 900 * sum(weights) / weights[1]
