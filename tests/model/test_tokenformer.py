from __future__ import annotations

import pytest
import torch

from megatron_tf.config.sections.model import Model
from megatron_tf.errors import ConfigError
from megatron_tf.model import TokenFormer, build_model


def test_a_model_made_without_build_model_can_be_trained():
    """It has initial weights too, of torch's random state, and none that happened to be in memory."""
    config = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 8, "vocab_size": 500,
              "parameter_tokens": {"qkv": 8, "proj": 8, "ffn": 32}}  # fmt: skip
    torch.manual_seed(0)
    model = TokenFormer(Model.model_validate(config))
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    ids = torch.arange(8)[None]
    loss = torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:])
    loss.backward()
    assert 5 < loss.item() < 8 and all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_attention_heads": 3},
            "model.hidden_size: 128 is not a multiple of model.num_attention_heads 3. Set it to",
        ),
        ({"rotary_fraction": 0.1}, "model.rotary_fraction: 0.1 of 32 channels a head rotates 3 channels, but they are"),
    ],
)
def test_a_model_that_cannot_be_is_refused_as_in_training(changes, message):
    sizes = {"num_layers": 1, "hidden_size": 128, "num_attention_heads": 4, "seq_length": 8, "vocab_size": 50,
             "parameter_tokens": {"qkv": 8, "proj": 8, "ffn": 8}}  # fmt: skip
    for build in (TokenFormer, build_model):
        with pytest.raises(ConfigError, match=message):
            build(Model.model_validate({**sizes, **changes}))
