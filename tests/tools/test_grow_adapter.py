from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from peft import get_peft_model
from tooling import assert_refused, tool

from megatron_tf.adapters import PattentionConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))
from decoders import decoder, fill  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`base`, a tiny Llama, and `adapter`, 8 tokens for it; `other` is another base of the same shape."""
    folder = tmp_path_factory.mktemp("grow")
    decoder().save_pretrained(folder / "base")
    decoder(seed=1).save_pretrained(folder / "other")
    model = get_peft_model(decoder(), PattentionConfig(num_tokens=8))
    fill(model)
    model.save_pretrained(folder / "adapter")
    return folder


@pytest.mark.slow
def test_growth_is_proved_on_the_base_before_it_is_published(folder):
    done = tool("grow_adapter", "--from", folder / "adapter", "--tokens", 12, "--freeze-old", "--base", folder / "base",
                "--to", folder / "grown")  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "4 branches of 8 tokens" in done.stdout and "12 tokens, 8 frozen" in done.stdout
    assert "branch by branch, on random inputs: outputs differ by" in done.stdout
    assert f"on {folder / 'base'}: logits differ by" in done.stdout and "\nwrote " in done.stdout
    config = json.loads((folder / "grown" / "adapter_config.json").read_text())
    assert (config["num_tokens"], config["frozen_tokens"], config["history"][0]["method"]) == (12, 8, "zero_key")
    done = tool(
        "grow_adapter", "--from", folder / "adapter", "--tokens", 12, "--base", folder / "other", "--to", folder / "no"
    )
    assert done.returncode == 2 and "the matrices of this model are not those" in done.stderr
    assert done.stderr.rstrip().endswith("). Give the same weights.")
    assert not (folder / "no").exists() and not (folder / "no.partial").exists()


def test_bad_input_is_one_message(folder):
    source = ("--from", folder / "adapter")
    for arguments, fragments in (
        ((*source, "--tokens", 8, "--to", folder / "no"), ("--tokens: 8", "Give more to grow it")),
        ((*source, "--tokens", 4, "--shrink", "--method", "gram", "--to", folder / "no"), ("--shrink", "of growth")),
        ((*source, "--tokens", 16, "--to", folder / "base"), ("exists already",)),
        (("--from", folder / "base", "--tokens", 16, "--to", folder / "no/it"), ("adapter_config.json: No such file",)),
    ):
        assert_refused(tool("grow_adapter", *arguments), *fragments)
    assert not (folder / "no").exists()
    done = tool("grow_adapter", *source, "--tokens", 16, "--to", folder / "no/it", "--dry-run")
    assert done.returncode == 0 and done.stdout.endswith("dry run: nothing is written\n"), done.stderr
    assert not (folder / "no").exists()


def test_inspect_shows_an_adapter_and_what_a_growth_has_changed(folder):
    done = tool("grow_adapter", "--from", folder / "adapter", "--tokens", 10, "--to", folder / "ten")
    assert done.returncode == 0, done.stderr
    done = tool("inspect_checkpoint", folder / "ten", "--diff", folder / "adapter")
    assert done.returncode == 1, done.stderr
    for text in ("10 in each branch, 0 frozen", "llama", "growth 1", "model.layers.1.mlp", "10 -> 8", "0 of 256"):
        assert text in done.stdout, (text, done.stdout)
    done = tool("inspect_checkpoint", folder / "ten", "--json", "--diff", folder / "ten")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and (found["differences"], found["differing_settings"]) == ([], {})
    assert_refused(
        tool("inspect_checkpoint", folder / "ten", "--diff", folder / "base"), "adapter_config.json: No such"
    )
