from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from prepared import write_tokens
from tooling import PROJECT, assert_refused, tool

from megatron_tf.config import load_config
from megatron_tf.config.run_plan import plan_batches
from megatron_tf.costs.estimate import memory_per_rank, num_parameters

CONFIGS = Path(PROJECT) / "configs"
CHAIN_OF_IMAGES = """
extends: {configs}/tiny_vision.yml
run: {{name: images, dir: runs/images}}
training: {{train_steps: 10}}
optimizer: {{schedule: {{warmup_steps: 2}}}}
growth: {{method: zero_key}}
stages:
  - {{name: small}}
  - {{name: large, model: {{parameter_tokens: {{ffn: 384}}}}}}
"""


def plan(*arguments):
    done = tool("plan_run", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_json_holds_what_the_configuration_gives():
    made = plan(CONFIGS / "1.4B.yml", "--gpus", 16, "--gpu", "a100", "--best", 3)
    (stage,) = made["stages"]
    config = load_config(CONFIGS / "1.4B.yml")
    assert stage["parameters"] == num_parameters(config.model)
    assert stage["memory"]["total"] == memory_per_rank(config, 16).total
    assert stage["run"]["tokens"] == plan_batches(config, 16).train_tokens
    assert stage["layout"] == "TP2×PP1×DP8 micro batch 8 +sequence" and stage["fits"] and stage["problems"] == []
    assert len(stage["best_layouts"]) == 3
    assert stage["best_layouts"][0]["step_seconds"] <= stage["step_seconds"]
    assert stage["activations_by_checkpointing"]["on"] < stage["activations_by_checkpointing"]["off"]
    assert made["gpu"]["name"] == "a100" and made["chain"] == [] and len(made["assumptions"]) >= 4


def test_tokens_and_overrides():
    made = plan(CONFIGS / "124M.yml", "--gpus", 8, "--tokens", "15e9", "training.micro_batch_size=16")
    (stage,) = made["stages"]
    assert stage["run"]["tokens"] == pytest.approx(15e9, rel=1e-4)
    assert "micro batch 16" in stage["layout"]
    steps = plan(CONFIGS / "tiny.yml", "--gpus", 1, "--tokens", "1e6")["stages"][0]["run"]
    assert steps["tokens"] == pytest.approx(1e6, rel=0.01)


def test_thousands_of_gpus_in_words():
    done = tool(
        "plan_run", CONFIGS / "pile_1.5B.yml", "--gpus", 4096, "--gpu", "h200", "training.global_batch_size=8192",
        "training.micro_batch_size=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text in ("4,096 × h200", "valid, fits", "best layouts", "GPU-hours", "MWh", "checkpoint.interval_steps=", "MFU",
                 "data-parallel communication", "They assume that", "matrix products reach 70%"):  # fmt: skip
        assert text in done.stdout, done.stdout


def test_a_chain_compared_with_training_from_scratch():
    made = plan(CONFIGS / "chain_124M_to_1.4B.yml", "--gpus", 8, "--scratch-tokens", "96e9")
    assert [cost["name"] for cost in made["chain"]] == ["chain-124M", "chain-354M", "chain-757M", "chain-1.4B"]
    assert {round(tokens) for cost in made["chain"] for tokens in cost["scratch_tokens"]} == {96_000_000_000}
    assert made["advice"] is None
    text = tool("plan_run", CONFIGS / "chain_124M_to_1.4B.yml", "--gpus", 8, "--best", 1).stdout
    assert re.search(r"chain-124M +\d+,\d+,\d+ +[\d.]+ B ", text), text
    assert "The chain, compared with training each size from scratch" in text and "all sizes:" in text
    assert "is 0.30 to 0.70, an assumption; a study measures it." in text and "growth pays above κ" in text


def test_a_plan_of_images_counts_images(tmp_path):
    config = load_config(CONFIGS / "tiny_vision.yml")
    (tmp_path / "chain.yml").write_text(CHAIN_OF_IMAGES.format(configs=CONFIGS))
    made = plan(tmp_path / "chain.yml", "--gpus", 1)
    stage = made["stages"][0]
    assert (stage["unit"], stage["unit_tokens"]) == ("images", config.model.seq_length)
    assert stage["run"]["tokens"] == 10 * 128 * config.model.seq_length
    done = tool("plan_run", tmp_path / "chain.yml", "--gpus", 1, "--best", 1).stdout
    speed = f"{stage['step']['tokens_per_second'] / config.model.seq_length:,.0f} images/s"
    for words in (f"128 images, {speed}", "10 steps, 1,280 images", "from scratch: images", "φ = own images / from"):
        assert words in done, done
    assert "tokens" not in done.split("Parameters, bytes sent")[0]
    chain = done.partition("The chain, compared")[2].partition("R = ")[0]
    assert "1.28 K" in chain and "< 0.01" in chain and " 0 GPU-hours" not in done and "e-0" not in chain, chain


def test_when_to_grow_by_what_a_study_has_found(tmp_path):
    law = {"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28, "points": 40, "residual": 0.01,
           "parameters": [1e5, 1e6], "tokens": [1e6, 1e7], "flops": [1e13, 1e14]}  # fmt: skip
    growth = {"kappa": {"mean": 0.55, "bound": None}}
    (tmp_path / "results.json").write_text(json.dumps({"laws": {"tokenformer": law}, "arms": [{"growth": growth}]}))
    chain = (CONFIGS / "chain_124M_to_1.4B.yml", "--gpus", 8, "--best", 1, "--study", tmp_path / "results.json")
    text = tool("plan_run", *chain, "--budget", "1e21").stdout
    for words in (f"is 0.55, as measured in {tmp_path}/results.json", "When to grow, for 1e+21 FLOPs",
                  "best size   chain-",
                  "warning     extrapolated: parameters: chain-124M 1.24e+08, chain-354M", "κ 0.55",
                  "costs 0.946 of the best size",
                  "fitted to 40 runs of 1e+05 to 1e+06 parameters"):  # fmt: skip
        assert words in text, text
    assert "no growth: each costs more" in tool("plan_run", *chain, "--kappa", "0.01", "0.02").stdout


def test_a_layout_that_cannot_run_is_refused_and_others_are_named():
    done = tool("plan_run", CONFIGS / "124M.yml", "--gpus", 64)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: training.global_batch_size: 512 is not a multiple of 2048")
    assert "not valid" in done.stdout and "TP1×PP1×DP64 micro batch 8" in done.stdout


def test_a_chain_that_the_trainer_refuses_is_refused(tmp_path):
    text = (CONFIGS / "tiny_chain.yml").read_text()
    for old, new, problem in (
        (
            "ffn: 768",
            "ffn: 256",
            "model.parameter_tokens.ffn: 512 before, 256 after. Growth cannot take tokens away: set it to 512, "
            "or prune the smaller model first: megatron_tf prune --tokens ffn=256.",
        ),
        ("method: zero_key", "method: gram", "gram needs at least 128 new qkv tokens"),
    ):
        (tmp_path / "chain.yml").write_text(text.replace(old, new))
        done = tool("plan_run", tmp_path / "chain.yml", "--gpus", 2)
        assert done.returncode == 2 and "The chain, compared" not in done.stdout
        assert "error: " in done.stderr and f"stage tiny_chain-tokens192: {problem}" in done.stderr.replace(
            "growth.method: gram", "gram"
        )


def test_layouts_are_not_blamed_for_the_length():
    done = tool("plan_run", CONFIGS / "tiny.yml", "--gpus", 1, "--tokens", 1)
    assert done.returncode == 2 and "warmup_steps" in done.stderr and "No layout" not in done.stdout


def test_candidates_that_do_not_fit_are_named():
    many = CONFIGS / "sparse_124M_to_762M.yml", "--gpus", 8, "model.sparse.ffn.candidates=256"
    (stage,) = plan(*many, "--best", 1)["stages"]
    assert stage["banks"]["does_not_fit"] and stage["banks"]["memory_remedies"][0]["fits"]
    done = tool("plan_run", *many, "--best", 1)
    assert done.returncode == 0 and "candidates are what does not fit" in done.stdout, done.stdout
    assert plan(CONFIGS / "tiny.yml", "--gpus", 1)["stages"][0]["banks"] is None


def test_what_does_not_fit_is_said():
    done = tool("plan_run", CONFIGS / "1.4B.yml", "--gpus", 2, "--gpu", "rtx4090", "--storage-gb-per-s", "0.5")
    assert done.returncode == 0 and "valid, DOES NOT FIT" in done.stdout


def test_mistakes(tmp_path):
    assert_refused(tool("plan_run", CONFIGS / "124M.yml", "--gpus", 8, "--gpu", "tpu"), "--gpu: 'tpu' is not known")
    chain = CONFIGS / "chain_124M_to_1.4B.yml"
    assert_refused(
        tool("plan_run", chain, "--gpus", 8, "--tokens", "1e9"), "--tokens", "stages.NAME.training.train_tokens"
    )
    in_fp8 = CONFIGS / "124M.yml", "training.precision=fp8", "--gpus", 8
    assert_refused(tool("plan_run", *in_fp8, "--gpu", "a100"), "--gpu a100. Set it to bf16, or choose among h100, h200")
    assert_refused(tool("plan_run", CONFIGS / "tiny.yml", "--gpus", 2, "--scratch-tokens", "1e9"), "is no chain")
    assert_refused(tool("plan_run", CONFIGS / "tiny.yml", "--gpus", 2, "--kappa", 0.1, 0.2), "--kappa: ", "is no chain")
    assert_refused(tool("plan_run", chain, "--gpus", 8, "--budget", "1e20"), "--budget: ", "Give --study results.json")
    assert_refused(tool("plan_run", tmp_path / "none.yml", "--gpus", 8), "none.yml")
    for option, value, expected in (
        ("--gpus", "0", "not a whole number from 1 to"),
        ("--tokens", "-1", "from 1 to 1e+18"),
        ("--tokens", "1e300", "from 1 to 1e+18"),
        ("--storage-gb-per-s", "1e-7", "from 1e-06 to 1e+06"),
        ("--network-gb-per-s", "nan", "from 1e-06 to 1e+06"),
        ("--restart-minutes", "nan", "from 0 to 1e+06"),
    ):
        done = tool(
            "plan_run", CONFIGS / "tiny.yml", *(() if option == "--gpus" else ("--gpus", 1)), f"{option}={value}"
        )
        assert done.returncode == 2 and f"argument {option}" in done.stderr and expected in done.stderr


@pytest.mark.parametrize("config", ["tiny.yml", "tiny_chain.yml"])
def test_it_needs_no_torch(config, tmp_path):
    """From an empty folder: where the data are, it looks at them."""
    script = (
        f"import runpy, sys; sys.argv = ['x', {str(CONFIGS / config)!r}, '--gpus', '2'];"
        f"runpy.run_path({str(Path(PROJECT) / 'tools' / 'plan_run.py')!r}, run_name='__main__');"
        "assert not {'torch', 'deepspeed', 'numpy'} & set(sys.modules)"
    )
    paths = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=paths)
    assert done.returncode == 0, done.stderr
    # whose sizes are delivered
    assert ("all sizes include the decay of each" in done.stdout) == (config == "tiny_chain.yml")


def test_passes_over_the_data_and_a_vocabulary_that_is_too_small(tmp_path):
    write_tokens(tmp_path / "tokens", documents=3)
    own = [f"data.train=[{{path: {tmp_path}/tokens}}]", f"data.validation=[{{path: {tmp_path}/tokens}}]"]
    done = tool("plan_run", CONFIGS / "tiny.yml", "--gpus", 1, *own, "data.tokenizer=null")
    assert done.returncode == 0, done.stderr
    assert f"  data        300 tokens in {tmp_path}/tokens, " in done.stdout and " passes over them" in done.stdout
    assert "  warning     data.train: the run makes" in done.stdout
    assert f"  warning     data.validation: {tmp_path}/tokens is training data too" in done.stdout
    planned = json.loads(
        tool("plan_run", CONFIGS / "tiny.yml", "--gpus", 1, "--json", *own, "data.tokenizer=null").stdout
    )
    assert planned["stages"][0]["data"]["sources"][0]["tokens"] == 300
    refused = tool("plan_run", CONFIGS / "tiny.yml", "--gpus", 1, *own, "data.tokenizer=bytes", "model.vocab_size=256")
    assert refused.returncode == 2 and "model.vocab_size: 256, but data.tokenizer bytes has 257" in refused.stderr
    # the second size reads on where the first one stopped, before its decay
    chain = tool("plan_run", CONFIGS / "tiny_chain.yml", "--gpus", 2, "--json", *own, "data.tokenizer=null")
    found = json.loads(chain.stdout)
    passes = [stage["data"]["sources"][0]["passes"] for stage in found["stages"]]
    tokens = [cost["chain_tokens"] for cost in found["chain"]]
    assert [own / passes[0] for own in passes] == pytest.approx([own / tokens[0] for own in tokens])
    # and one with another seed begins again
    reseeded = tool("plan_run", CONFIGS / "tiny_chain.yml", "--gpus", 2, "--json", *own, "data.tokenizer=null",
                    "stages.tokens256.run.seed=5")  # fmt: skip
    last = json.loads(reseeded.stdout)["stages"][-1]["data"]["sources"][0]["passes"]
    assert 0 < last < passes[-1] - passes[-2] / 2
    elsewhere = tool("plan_run", CONFIGS / "tiny.yml", "--gpus", 1, f"data.train=[{{path: {tmp_path}/none}}]")
    assert "not on this machine" in elsewhere.stdout
