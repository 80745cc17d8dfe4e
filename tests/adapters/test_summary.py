from __future__ import annotations

import math

import pytest
from decoders import decoder, fill
from peft import get_peft_model

from megatron_tf.adapters import PattentionConfig
from megatron_tf.adapters.folder import Adapter, Branch, read_adapter, write_adapter
from megatron_tf.adapters.growth import grow_adapter
from megatron_tf.adapters.summary import adapter_folder, differences, differing_settings, summarize, trained_adapter
from megatron_tf.errors import CheckpointError


@pytest.fixture
def folder(tmp_path):
    model = get_peft_model(decoder(), PattentionConfig(num_tokens=6, modules="mlp"))
    fill(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_summary_has_places_sizes_and_base(folder):
    found = summarize(folder, read_adapter(folder))
    assert (found["num_tokens"], found["parameters"], found["modules"]) == (6, 2 * 2 * 6 * 32, ["mlp"])
    assert found["scale"] == math.sqrt(6) and found["base"]["model_type"] == "llama" and found["base"]["matrices"]
    branch = found["branches"]["model.layers.1.mlp"]
    assert branch["widths"] == [32, 32] and branch["values_rms"] == pytest.approx(0.05, rel=0.2)


def test_a_grown_adapter_differs_in_number_and_not_in_its_old_tokens(folder):
    one = read_adapter(folder)
    assert list(differences(one, one)) == [] and differing_settings(one, one) == {}
    other = grow_adapter(one, 8)
    found = list(differences(one, other))
    assert len(found) == 4 and {difference.unequal for difference in found} == {0}
    assert found[0].shapes == ((6, 32), (8, 32)) and differing_settings(one, other) == {"num_tokens": [6, 8]}


def test_values_and_branches_that_differ_are_counted(folder):
    one = read_adapter(folder)
    name, other_name = one.branches
    values = one.branches[name].values.clone()
    values[0, 0] += 0.5
    values[1, 1] = math.nan
    changed = Adapter(one.config, {name: Branch(one.branches[name].keys, values)})
    found = {difference.name: difference for difference in differences(one, changed)}
    assert set(found) == {f"{name}.value_tokens", f"{other_name}.key_tokens", f"{other_name}.value_tokens"}
    assert found[f"{name}.value_tokens"].unequal == 2 and math.isnan(found[f"{name}.value_tokens"].largest)
    assert found[f"{other_name}.key_tokens"].shapes == ((6, 32), None)


def test_of_a_run_the_newest_checkpoint_is_looked_at(folder, tmp_path):
    assert adapter_folder(tmp_path / "none") is None and adapter_folder(folder) == folder
    assert adapter_folder(tmp_path) == folder
    for step in (2, 10):
        write_adapter(tmp_path / "checkpoints" / f"step_{step:08d}", read_adapter(folder))
    assert adapter_folder(tmp_path) == tmp_path / "checkpoints" / "step_00000010"
    assert adapter_folder(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step_00000010"


def test_a_run_stands_for_what_it_has_published(folder, tmp_path):
    assert trained_adapter(folder) == trained_adapter(tmp_path) == folder
    assert trained_adapter(tmp_path / "none") == tmp_path / "none"
    run = tmp_path / "stopped"
    write_adapter(run / "checkpoints" / "step_00000002", read_adapter(folder))
    with pytest.raises(
        CheckpointError, match="has not ended, so it has no adapter/.* give its newest checkpoint, .*00002$"
    ):
        trained_adapter(run)
