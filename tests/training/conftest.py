from __future__ import annotations

import pytest
from tiny import run_config


@pytest.fixture
def config():
    return run_config
