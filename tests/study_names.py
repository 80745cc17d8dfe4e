"""What tests of studies share: a growth, and what a study is refused for."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_tf.errors import ConfigError

BIGGER = {"model": {"parameter_tokens": {"qkv": 16, "proj": 16, "ffn": 32}}, "growth": {"method": "gram"}}


def problems_of(work: Callable[[], object]) -> list[str]:
    with pytest.raises(ConfigError) as error:
        work()
    return error.value.problems
