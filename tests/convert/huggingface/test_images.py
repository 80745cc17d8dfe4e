"""Classifiers of images as transformers loads them."""

from __future__ import annotations

import importlib
import json
import sys
from functools import partial
from types import ModuleType

import numpy as np
import pytest
import torch
from images import made_up, odd_classifier
from PIL import Image
from safetensors.torch import load_file
from tiny import run_config

from megatron_tf.checkpoint.architecture import check_format
from megatron_tf.convert.huggingface import image_export
from megatron_tf.convert.huggingface.image_export import write_image_export
from megatron_tf.convert.huggingface.importing import open_export
from megatron_tf.data.images.augment import seen
from megatron_tf.errors import CheckpointError
from megatron_tf.inference.images import class_names, keep_names
from megatron_tf.inference.load import load_model
from megatron_tf.tasks.image_classification.layers import normalised
from megatron_tf.tasks.image_classification.section import image_of

CLASSES = ("ape", "bee", "cat", "dog", "emu")
GREY = {"channels": 1, "crop": 1.0, "pooling": "mean"}
COLOUR = {"channels": 3, "crop": 0.75, "pooling": "class_token"}
TRANSFORMER = {
    "architecture": "transformer", "parameter_tokens": None, "ffn_hidden_size": 40, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
SPARSE = {
    "sparse": {"ffn": {"group_size": 16, "candidates": 3, "dense": 5}},
    "parameter_tokens": {"qkv": 37, "proj": 29, "ffn": 69},
}
KINDS = {
    "tokenformer": (COLOUR, {}),
    "grey": (GREY, {"activation": "gelu_l2_norm"}),
    "candidates": (COLOUR, SPARSE),
    "transformer": (GREY, TRANSFORMER),
    "colour transformer": (COLOUR, TRANSFORMER),
}  # fmt: skip


def load(folder):
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    return model, AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_computes_what_the_model_does_and_comes_back(kind, tmp_path):
    network = odd_classifier(*KINDS[kind])
    found = write_image_export(tmp_path / "out", network, CLASSES)
    assert found["images"].holds and found["images"].largest > 0.1
    export = open_export(tmp_path / "out")
    assert export.model == network.config and export.scales == network.scales
    for name, weight in network.state_dict().items():
        assert torch.equal(export.weights[name], weight), name


@pytest.fixture(scope="module")
def network():
    return odd_classifier(*KINDS["tokenformer"])


@pytest.fixture(scope="module")
def folder(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("exports") / "model"
    write_image_export(path, network, CLASSES)
    return path


@pytest.fixture(scope="module")
def processor(folder):
    return load(folder)[1]


@pytest.mark.parametrize("size", [(9, 20), (31, 8), (5, 4), (8, 8), (6, 6), (7, 15)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK", "P", "I;16"])
def test_the_processor_sees_what_an_evaluation_sees(processor, network, size, mode):
    levels = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    picture = Image.fromarray(levels)
    deep = Image.fromarray(levels[..., 0].astype(np.uint16) * 250)
    picture = deep if mode == "I;16" else picture.convert(mode)
    image = image_of(network.config)
    expected = normalised(torch.from_numpy(seen(picture, image))[None], image)
    assert torch.equal(processor(picture, return_tensors="pt")["pixel_values"], expected)


def test_a_pipeline_names_the_classes(folder, network, tmp_path):
    from transformers import pipeline

    picture = Image.fromarray(np.random.default_rng(2).integers(0, 256, (9, 12, 3), np.uint8))
    picture.save(tmp_path / "picture.png")
    answers = pipeline("image-classification", folder.as_posix(), trust_remote_code=True)(
        str(tmp_path / "picture.png"), top_k=5
    )
    pixels = torch.from_numpy(seen(picture, image_of(network.config)))[None]
    with torch.no_grad():
        shares = network(pixels).softmax(1)[0]
    assert [answer["label"] for answer in answers] == [CLASSES[number] for number in shares.argsort(descending=True)]
    np.testing.assert_allclose([answer["score"] for answer in answers], shares.sort(descending=True)[0], rtol=1e-4)


def test_a_grey_model_takes_grey_pictures_by_their_path(tmp_path):
    """transformers makes three channels of whatever it reads."""
    network = odd_classifier(*KINDS["grey"])
    write_image_export(tmp_path / "out", network, CLASSES)
    _, processor = load(tmp_path / "out")
    Image.fromarray(made_up(1)[0][0]).save(tmp_path / "grey.png")
    image = image_of(network.config)
    expected = normalised(torch.from_numpy(made_up(1)[0][0])[None, None], image)
    assert torch.equal(processor(str(tmp_path / "grey.png"), return_tensors="pt")["pixel_values"], expected)


def test_training_goes_on_in_transformers_and_comes_back(folder, tmp_path):
    from transformers import AutoModelForImageClassification

    model, _ = load(folder)
    loss = model(pixel_values=torch.rand(2, 3, 6, 6), labels=torch.tensor([1, 4])).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    other = AutoModelForImageClassification.from_pretrained(
        folder, trust_remote_code=True, num_labels=3, ignore_mismatched_sizes=True
    )
    assert other(torch.rand(2, 3, 6, 6)).logits.shape == (2, 3)
    other.save_pretrained(tmp_path / "three")
    assert image_of(open_export(tmp_path / "three").model).classes == 3
    assert load_model(tmp_path / "three")(torch.zeros(1, 3, 6, 6)).shape == (1, 3)


def test_the_names_of_an_export_are_known(folder):
    assert class_names(folder, load_model(folder), None) == CLASSES


def test_names_that_a_file_of_lines_cannot_hold_are_not_kept(tmp_path):
    for names in (("a", "a"), ("a", ""), ("a", "b\nc"), ("a", " b"), ("a", "b\x85")):
        assert not keep_names(tmp_path, names)
    assert not list(tmp_path.iterdir())
    assert keep_names(tmp_path, CLASSES) and (tmp_path / "classes.txt").read_text().split() == list(CLASSES)


def test_another_model_or_processor_is_not_published(network, tmp_path, monkeypatch):
    def other(kind, **changes):
        real = getattr(image_export, kind)
        monkeypatch.setattr(image_export, kind, lambda *arguments: {**real(*arguments), **changes})

    with monkeypatch.context():
        other("processor_config", crop=0.9)
        with pytest.raises(CheckpointError, match="processor gives other pixels than an evaluation sees"):
            write_image_export(tmp_path / "out", network, CLASSES)
    monkeypatch.undo()
    other("image_config", layer_norm_eps=0.1)
    with pytest.raises(CheckpointError, match="another function from the export.*on images"):
        write_image_export(tmp_path / "out", network, CLASSES)
    assert not list(tmp_path.iterdir())


def test_forged_configurations_are_refused(folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    config = json.loads((folder / "config.json").read_text())
    (copy / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    for change, message in (
        ({"image": {**config["image"], "size": 7}}, "image.size: 7 is not a multiple of image.patch"),
        ({"parameter_tokens": None}, "parameter_tokens: missing"),
        ({"image": None}, "image: "),
        ({"scales": config["scales"][:-1]}, "scales: are of 1 layers, the model has 2"),
    ):
        (copy / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=message):
            open_export(copy)


def test_timm_makes_the_model(folder, network, monkeypatch):
    """With stand-ins for the two functions of timm that the module calls; tests/evaluation has the real ones."""
    registered = {}

    def build(kind, name, pretrained, pretrained_filter_fn, **kwargs):
        model = kind(**kwargs)
        model.load_state_dict(pretrained_filter_fn(load_file(folder / "model.safetensors"), model))
        return model

    models = ModuleType("timm.models")
    models.build_model_with_cfg, models.register_model = build, lambda make: registered.setdefault(make.__name__, make)
    for name, module in (("timm", ModuleType("timm")), ("timm.models", models)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(folder)
    for name in ("tokenformer_timm", "tokenformer_export"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    timm_module = importlib.import_module("tokenformer_timm")
    settings = timm_module.default_cfgs["tokenformer_image"]
    channels, *size = settings["input_size"]
    make = partial(registered["tokenformer_image"], True, num_classes=settings["num_classes"])
    model = make(in_chans=channels, img_size=size).eval()
    pixels = torch.rand(3, 3, 6, 6)
    torch.testing.assert_close(model(pixels), network(pixels), rtol=1e-5, atol=1e-5)
    assert model.forward_head(model.forward_features(pixels), pre_logits=True).shape == (3, model.num_features)
    model.reset_classifier(2)
    assert model(pixels).shape == (3, 2)
    with pytest.raises(ValueError, match="sees 3 channels of 6 pixels squared, and in_chans is 1"):
        make(in_chans=1)


def test_a_transformer_of_text_has_no_place():
    model = run_config(model=TRANSFORMER).model
    with pytest.raises(CheckpointError, match="cannot be exported: the code for the huggingface format.*image_class"):
        check_format(model, "huggingface", "exported")
    with pytest.raises(CheckpointError, match="transformer cannot be converted: the official format has no place"):
        check_format(model, "official", "converted")
