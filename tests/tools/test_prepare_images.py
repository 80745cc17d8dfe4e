"""The commands for images: a folder prepared, and a user's mistakes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from images import made_up
from tooling import assert_refused, tool

from megatron_tf.data.images.decode import png
from megatron_tf.data.images.summary import read_image_summary

NO_APT = os.pathsep.join(
    folder for folder in os.environ["PATH"].split(os.pathsep) if not (Path(folder) / "apt-get").exists()
)


@pytest.fixture
def folder(tmp_path) -> Path:
    for number, (image, label) in enumerate(zip(*made_up(4, classes=2))):
        place = tmp_path / "in" / f"class {label}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(png(image))
    return tmp_path / "in"


def test_a_folder_is_prepared(folder, tmp_path):
    (folder / "class 1" / "bad.jpg").write_bytes(b"bad")
    done = tool("prepare_images", "--input", folder, "--output-prefix", tmp_path / "out/x", "--on-error", "skip")
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/out/x: 4 images of 2 classes" in done.stdout
    assert f"left out of the input: 1 bad image, see {tmp_path}/out/x.report.json" in done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith("4 images (") and last.endswith("), 1 skipped") and "tokens" not in done.stderr
    assert "skipped " in done.stderr and "bad.jpg:1: cannot identify image file" in done.stderr
    assert read_image_summary(tmp_path / "out/x").classes == ("class 0", "class 1")


def test_images_that_were_trained_on_are_counted(folder, tmp_path):
    for name, options in (("train", ()), ("test", ("--classes-from", tmp_path / "train"))):
        done = tool("prepare_images", "--input", folder, "--output-prefix", tmp_path / name, *options)
        assert done.returncode == 0, done.stderr
    assert f"warning: {tmp_path}/test: 4 of its images are in {tmp_path}/train too" in done.stderr


def test_refusals(folder, tmp_path):
    out = ["--output-prefix", tmp_path / "x"]
    assert_refused(tool("prepare_images", "--input", tmp_path / "none", *out), "none: no such file")
    assert_refused(tool("prepare_images", "--input", folder, *out, "--classes-from", tmp_path / "y"), "y.json: No such")
    both = ["--classes", "2", "--classes-from", "y"]
    assert "both name the classes" in tool("prepare_images", "--input", folder, *out, *both).stderr


def test_without_apt_nothing_is_fetched(tmp_path):
    done = tool("fetch_images", tmp_path / "fashion", PATH=NO_APT)
    assert_refused(done, "dataset-fashion-mnist: cannot be fetched here: needs apt")
