"""The likeliest classes of images, as a command."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from images import image_config, made_up, write_images
from PIL import Image
from tiny import run_config
from tooling import assert_refused, tool

from megatron_tf.checkpoint.step_zero import write_step_zero
from megatron_tf.config.load import dump_config
from megatron_tf.config.schema import RunConfig
from megatron_tf.data.images.decode import png
from megatron_tf.model import build_model
from megatron_tf.state.sources import InitialSource, StepZero

CLASSES = ("ape", "bee", "cat", "dog", "emu")


def write_run(folder: Path, config: RunConfig) -> Path:
    start = StepZero(InitialSource(config.model, 3), 0, 0, ())
    write_step_zero(folder / "checkpoints", config.model, start, {}, lambda done, text: None)
    (folder / "config.yml").write_text(dump_config(config))
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    source = write_images(tmp_path / "train", *made_up(5), CLASSES)
    config = image_config({"channels": 1, "crop": 1.0}, data={"train": ({"path": source},)})
    for number, image in enumerate(made_up(2)[0]):
        (tmp_path / f"{number}.png").write_bytes(png(image))
    return write_run(tmp_path / "run", config)


def test_the_best_classes_are_shown(run, tmp_path):
    files = [tmp_path / "0.png", tmp_path / "1.png"]
    done = tool("classify_images", run, *files, "--best", 3)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [lines[0], lines[4]] == list(map(str, files)) and len(lines) == 8
    model = build_model(image_config({"channels": 1}).model, seed=3)
    with torch.no_grad():
        shares, numbers = model(torch.from_numpy(made_up(1)[0][0])[None, None]).softmax(1)[0].topk(3)
    expected = [f"  {100 * float(share):6.2f} %  {CLASSES[number]}" for share, number in zip(shares, numbers)]
    assert lines[1:4] == expected


def test_an_export_is_classified_with_and_named_as_the_run(run, tmp_path):
    out = tmp_path / "out"
    done = tool("convert_checkpoint", "to-hf", run, "--to", out)
    assert done.returncode == 0, done.stderr
    said = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "classes ape, bee, cat, dog, emu" in said
    assert any("5 classes of images of 6 in patches of 3" in line for line in said), said
    assert any(line.startswith("compared with transformers") and " on images: " in line for line in said)
    answers = [tool("classify_images", model, tmp_path / "0.png").stdout for model in (run, out)]
    assert answers[0] == answers[1] and "emu" in answers[0]
    done = tool("convert_checkpoint", "from-hf", out, "--to", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    assert tool("classify_images", tmp_path / "back", tmp_path / "0.png").stdout == answers[0]
    wrong = tool("convert_checkpoint", "to-hf", run, "--to", tmp_path / "other", "--tokenizer", "bytes")
    assert_refused(wrong, "--tokenizer: the model classifies images and has no tokenizer. Remove it.")


def test_refusals(run, tmp_path):
    image = tmp_path / "0.png"
    (tmp_path / "names").write_text("a\nb\n")
    (tmp_path / "text.png").write_text("text")
    Image.new("RGB", (4, 4)).save(tmp_path / "colour.png")
    assert_refused(tool("classify_images", run, image, tmp_path / "text.png"), "text.png: cannot identify image file")
    assert_refused(tool("classify_images", run, tmp_path / "colour.png"), "colour.png: mode RGB has colours")
    assert_refused(
        tool("classify_images", run, image, "--classes", tmp_path / "names"), "names 2 classes, the model tells 5"
    )
    os.mkfifo(tmp_path / "waits.png")
    assert_refused(tool("classify_images", run, tmp_path / "waits.png"), "waits.png: is a FIFO, where a file is exp")
    assert_refused(tool("classify_images", tmp_path / "nosuch", image), "a checkpoint or an export")
    text = write_run(tmp_path / "text", run_config())
    wrong = tool("convert_checkpoint", "to-hf", text, "--to", tmp_path / "other", "--classes", tmp_path / "names")
    assert_refused(wrong, "--classes: the model is of text and has no classes. Remove it.")
    assert_refused(tool("classify_images", text, image), "model.task: language_model, but classification needs a model")
