"""The model section of a classifier: what follows from the image, and what is refused."""

from __future__ import annotations

import json
import pickle

import pytest
from images import image_config

from megatron_tf.config import load_config
from megatron_tf.config.differences import differing
from megatron_tf.config.load import dump_config
from megatron_tf.config.sections.model import Model
from megatron_tf.config.validate import validate
from megatron_tf.errors import ConfigError
from megatron_tf.growth.rules import growth_problems
from megatron_tf.tasks.image_classification.section import image_of


def write(tmp_path, config) -> str:
    (tmp_path / "run.yml").write_text(dump_config(config))
    return str(tmp_path / "run.yml")


@pytest.mark.parametrize("pooling, positions", [("class_token", 5), ("mean", 4)])
def test_positions_follow_from_the_image(tmp_path, pooling, positions):
    config = image_config({"pooling": pooling})
    assert (config.model.seq_length, config.model.rotary_fraction) == (positions, 0)
    assert load_config(write(tmp_path, config)) == config
    assert pickle.loads(pickle.dumps(config.model)) == config.model
    assert Model.model_validate(json.loads(config.model.model_dump_json())) == config.model


def test_normalisation_is_imagenets_for_colours_and_one_half_for_grey():
    assert image_of(image_config().model).mean == (0.485, 0.456, 0.406)
    grey = image_of(image_config({"channels": 1}).model)
    assert (grey.mean, grey.std) == ((0.5,), (0.5,))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.seq_length=9",
         "model.seq_length: 9, but images of 6 in patches of 3 and a class token are 5 positions. Rem"),
        ("model.image.size=7", "model.image.size: 7 is not a multiple of model.image.patch 3. Set it to 6 or 9."),
        ("model.image.size=100000 model.image.patch=1",
         "model.image.size: images of 100000 in patches of 1 and a class token are 10,000,000,001 positions, and a "
         "model has at most 2,147,483,647. Lower it to at most 46,340, or raise model.image.patch."),
        ("model.image.classes=1", "model.image.classes: 1 is out of range. It must be at least 2."),
        ("model.image.channels=2", "model.image.channels: the number 2, but one of 1, 3 is expected"),
        ("model.image.mean=[0.5]", "model.image.mean: has 1 number, but model.image.channels is 3"),
        ("model.image.pooling=max", "one of class_token, mean is expected"),
        ("model.image=null", "model.image: missing. Add this section; it needs size, patch, classes."),
        ("model.rotary_fraction=0.5", "model.rotary_fraction: 0.5, but the positions of an image are learned"),
        ("model.vocab_size=99", "a classifier of images has model.image instead. Remove it, or set model.task to lang"),
        ("data.eod_id=0", "data.eod_id: 0 means nothing to the task image_classification"),
        ("data.augmentation.crop_scale=[0.5,0.1]", "data.augmentation.crop_scale: [0.5, 0.1] is no range"),
        ("data.augmentation.shift=6",
         "data.augmentation.shift: 6 pixels move images of model.image.size 6 out of sight. Set it to at most 5"),
        ("training.label_smoothing=1", "training.label_smoothing: 1 is out of range. It must be less than 1."),
        ("data.augmentation.mixup=0.8 training.micro_batch_size=1", "training.micro_batch_size: 1 is odd, but mixup"),
        ("parallel.tensor=4 parallel.sequence=true",
         "model.image.size: images of 6 in patches of 3 and a class token are 5 positions, which is not a multiple of "
         "parallel.tensor 4, which parallel.sequence needs. Set model.image.pooling to mean, which leaves 4 positions"),
        ("parallel.tensor=8", "model.image.classes: 5 rows cannot be split over parallel.tensor 8"),
    ],
)  # fmt: skip
def test_refusals(tmp_path, override, message):
    file = write(tmp_path, image_config({"pooling": "class_token"}))
    text = (tmp_path / "run.yml").read_text()
    (tmp_path / "run.yml").write_text("\n".join(line for line in text.splitlines() if "seq_length" not in line))
    with pytest.raises(ConfigError) as error:
        config = load_config(file, override.split())
        validate(config, config.parallel.tensor)
    assert message in str(error.value)
    assert "seq_length: missing" not in str(error.value)


def test_of_a_section_the_keys_that_mean_nothing_are_named():
    from tiny import run_config

    config = run_config(data={"augmentation": {"shift": 2, "rand_augment": {"magnitude": 5}}})
    message = "data.augmentation.shift: 2, data.augmentation.rand_augment.magnitude: 5.0 means nothing to the task lang"
    with pytest.raises(ConfigError, match=message):
        validate(config, 1)


def test_settings_of_images_mean_nothing_to_a_language_model():
    from tiny import run_config

    config = run_config(training={"label_smoothing": 0.1})
    with pytest.raises(ConfigError, match="training.label_smoothing: 0.1 means nothing to the task language_model"):
        validate(config, 1)


def test_the_length_that_follows_from_the_image_is_not_named():
    before, after = image_config().model, image_config({"size": 12}).model
    assert (before.seq_length, after.seq_length) == (4, 16)
    assert list(differing(before, after)) == [("image.size", 6, 12)]


@pytest.mark.parametrize("pooling", ["mean", "class_token"])
def test_the_largest_image_that_a_message_offers_is_taken(tmp_path, pooling):
    validate(image_config({"pooling": pooling, "size": 46_340 * 3}), 1)
    with pytest.raises(ConfigError, match="model.image.size: images of 139023 .* Lower it to at most 139,020, or "):
        validate(image_config({"pooling": pooling, "size": 46_341 * 3}), 1)


def test_growth_keeps_the_task():
    """Each key of model.image was refused on its own, with the remedy to set it to null."""
    from tiny import run_config

    assert growth_problems(run_config().model, image_config().model) == [
        "model.task: language_model before, image_classification after. Growth keeps the task: give a smaller model of "
        "the same task, or train the new one from scratch, without growth."
    ]
    assert list(differing(run_config().model, image_config().model)) == [
        ("task", "language_model", "image_classification")
    ]
