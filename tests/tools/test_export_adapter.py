from __future__ import annotations

import sys
from pathlib import Path

import pytest
from peft import get_peft_model
from tooling import assert_refused, tool

from megatron_tf.adapters import PattentionConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))
from decoders import decoder, fill  # noqa: E402


@pytest.mark.slow
def test_base_and_adapter_become_one_folder(tmp_path):
    decoder().save_pretrained(tmp_path / "base")
    model = get_peft_model(decoder(), PattentionConfig(num_tokens=4))
    fill(model)
    model.save_pretrained(tmp_path / "adapter")
    arguments = ("--base", tmp_path / "base", "--adapter", tmp_path / "adapter", "--to", tmp_path / "export")
    done = tool("export_adapter", *arguments)
    assert done.returncode == 0, done.stderr
    assert "on random tokens: logits differ by" in done.stdout and "on generation with a cache" in done.stdout
    assert "\nwrote " in done.stdout
    assert_refused(tool("export_adapter", *arguments), "exists already")
