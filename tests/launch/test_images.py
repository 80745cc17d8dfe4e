"""Images the way users train on them: trained, evaluated and grown at other layouts, with one message for mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from images import made_up, write_images
from launching import evaluate, train
from tooling import tool

CONFIG = """
run: {{dir: {folder}/run, name: test}}
model:
  task: image_classification
  image: {{size: 6, patch: 3, channels: 1, classes: 5, pooling: mean, crop: 1}}
  num_layers: 2
  hidden_size: 32
  num_attention_heads: 4
  parameter_tokens: {{qkv: 13, proj: 11, ffn: 37}}
training: {{train_steps: 6, global_batch_size: 8, micro_batch_size: 2, precision: fp32, label_smoothing: 0.1}}
optimizer: {{lr: 1e-2, schedule: {{warmup_steps: 2}}}}
data:
  train: {folder}/images
  validation: {folder}/held_out
  augmentation: {{crop_scale: [0.5, 1], flip: 0.5, mixup: 0.8, cutmix: 1, erasing: 0.25}}
evaluation: {{samples: 100}}
logging: {{interval_steps: 1}}
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    write_images(tmp_path / "images", *made_up(30), tuple("abcde"))
    write_images(tmp_path / "held_out", *made_up(13), tuple("abcde"))
    (tmp_path / "config.yml").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_trained_evaluated_and_grown(folder):
    done = train(folder)
    assert done.returncode == 0, done.stdout
    assert "30 images in" in done.stdout and "validation loss" in done.stdout and "top-1" in done.stdout
    assert " images/s " in done.stdout and " tokens/s " not in done.stdout
    last = next(record for record in reversed(records(folder / "run")) if "eval/top1" in record)
    assert last["epoch"] == pytest.approx(6 * 8 / 30)
    for ranks, *overrides in ((0,), (4, "parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true")):
        output = folder / f"with {ranks} ranks"
        done = evaluate(folder, "--output", output, "--per-class", *overrides, ranks=ranks)
        assert done.returncode == 0, done.stdout
        (found,) = json.loads((output / "step_00000006_images.json").read_text())["data"]
        assert (found["images"], found["top1"]) == (13, pytest.approx(last["eval/top1"]))
        assert (found["loss"], found["top5"]) == (pytest.approx(last["eval/loss"], rel=1e-5), 1)
        assert [entry["images"] for entry in found["classes"]] == [3, 3, 3, 2, 2]
        assert "class of" in done.stdout and (output / "step_00000006_images.csv").exists()
    done = train(
        folder, f"run.dir={folder}/grown", f"growth.from={folder}/run", "parallel.tensor=2", "parallel.sequence=true",
        "model.parameter_tokens={qkv: 20, proj: 17, ffn: 60}", "training.train_steps=3", ranks=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "growth: held batch" in (folder / "grown" / "train.log").read_text()
    # what two tensor-parallel ranks wrote is exported, and computes the same in transformers
    done = tool("convert_checkpoint", "to-hf", folder / "grown", "--to", folder / "exported")
    assert done.returncode == 0 and "on images: logits differ by" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.image.classes=4", "images.json: 5 classes (beyond: 'e'), model.image.classes is 4"),
        ("model.image.size=8", "model.image.size: 8 is not a multiple of model.image.patch 3"),
        ("data.validation={folder}/none", "no such file. Prepare the data with tools/prepare_images.py"),
    ],
)
def test_mistakes_are_one_message(folder, override, message):
    done = train(folder, override.format(folder=folder))
    assert done.returncode == 2 and done.stdout.count("error: ") == 1, done.stdout
    assert message in done.stdout and not (folder / "run").exists()
