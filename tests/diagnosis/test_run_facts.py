"""What all ranks of a run must have in common."""

from __future__ import annotations

from prepared import write_tokens

from megatron_tf.diagnosis.run_facts import run_facts


def changed(before, after):
    return {
        name: (before.get(name), after.get(name)) for name in {**before, **after} if before.get(name) != after.get(name)
    }


def test_every_key_of_the_configuration(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts = run_facts("train", [config()])
    assert facts["the command"] == "train" and facts["optimizer.lr"] == "0.001" and facts["growth"] == "null"
    assert facts["optimizer.betas"] == "[0.9, 0.95]" and facts["data.train[0].path"] == "unused"
    assert facts["the data unused"].startswith("not readable (unused.bin")
    assert "torch" in facts and "the code of megatron_tf" in facts
    other = run_facts("train", [config(optimizer={"lr": 1e-2}, training={"train_steps": 21})])
    assert changed(facts, other) == {"optimizer.lr": ("0.001", "0.01"), "training.train_steps": ("20", "21")}


def test_a_relative_folder_of_the_run_is_another_one_elsewhere(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = run_facts("train", [config()])
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert changed(here, run_facts("train", [config()]))["run.dir"] == (
        f"{tmp_path}/unused",
        f"{tmp_path}/other/unused",
    )


def test_data_tokenizer_and_options(config, tmp_path):
    write_tokens(tmp_path / "a")
    write_tokens(tmp_path / "b")
    (tmp_path / "tokenizer.json").write_text("{}")
    data = {"train": ({"path": f"{tmp_path}/a"},), "tokenizer": f"{tmp_path}/tokenizer.json"}

    def facts(stride):
        return run_facts("evaluate", [config(data=data)], {"--stride": stride, "--limit": None}, [f"{tmp_path}/b"])

    before = facts(3)
    assert before["--stride"] == "3" and "--limit" not in before
    for name in "ab":
        assert before[f"the data {tmp_path}/{name}"].startswith("4,000 tokens in 40 documents, SHA-256 ")
        write_tokens(tmp_path / name, documents=41)
    (tmp_path / "tokenizer.json").write_text("{ }")
    assert set(changed(before, facts(4))) == {
        "--stride",
        f"the data {tmp_path}/a",
        f"the data {tmp_path}/b",
        f"the tokenizer {tmp_path}/tokenizer.json",
    }


def test_stages_are_told_apart(config):
    first, second = config(run={"name": "small"}), config(run={"name": "large"}, optimizer={"lr": 5.0})
    facts = run_facts("train", [first, second])
    assert (facts["stage small: optimizer.lr"], facts["stage large: optimizer.lr"]) == ("0.001", "5.0")
