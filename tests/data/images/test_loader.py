"""Batches of prepared images: the same at every layout, every image once in evaluation, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from images import MIXING, image_config, made_up, write_contents, write_images
from prepared import write_tokens

from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.data import DataSource
from megatron_tf.data.images.duplicates import count_duplicates
from megatron_tf.data.images.loader import ImageLoader, open_images
from megatron_tf.data.images.source import ImageFiles, ImageSource
from megatron_tf.data.indexed import data_file
from megatron_tf.data.loader import open_tokens
from megatron_tf.errors import DataError
from megatron_tf.tasks.image_classification.data import IMAGE_DATA

CLASSES = tuple("abcde")


@pytest.fixture
def source(tmp_path) -> str:
    return write_images(tmp_path / "images", *made_up(13), CLASSES)


def run(source: str, **augmentation) -> RunConfig:
    data = {"train": ({"path": source},), "validation": ({"path": source},), "augmentation": augmentation}
    return image_config({"channels": 1, "crop": 1.0}, data=data, training={"label_smoothing": 0.1})


def loader(config: RunConfig, training: bool = True, micro: int = 2, number: int = 6, rank: int = 0, size: int = 1):
    return IMAGE_DATA.open(config).loader(
        config.data.train, micro_batch_size=micro, num_micro_batches=number, data_rank=rank, data_size=size,
        training=training,
    )  # fmt: skip


def step(loader: ImageLoader, first: int = 0) -> list[torch.Tensor]:
    return [torch.cat(parts) for parts in zip(*loader.step_batches(first))]


def test_a_step_is_the_same_at_every_layout(source):
    config = run(source, **MIXING)
    whole = step(loader(config), 24)
    ranks = [list(loader(config, number=3, rank=rank, size=2).step_batches(24)) for rank in range(2)]
    in_order = [ranks[rank][micro] for micro in range(3) for rank in range(2)]
    larger = step(loader(config, micro=6, number=2), 24)
    for own, split, other in zip(whole, [torch.cat(parts) for parts in zip(*in_order)], larger):
        assert torch.equal(own, split) and torch.equal(own, other)
    assert whole[0].dtype == torch.uint8 and whole[1].dtype == torch.float32
    assert [tensor.shape for tensor in whole] == [(12, 1, 6, 6), (12, 5)]


def test_threads_change_nothing(source):
    config = run(source, **MIXING)
    threaded = config.model_copy(update={"data": config.data.model_copy(update={"workers": 3})})
    assert all(map(torch.equal, step(loader(config)), step(loader(threaded))))
    assert step(loader(threaded, False, 5, 3))[1].sum() == 13


def test_an_epoch_has_every_image_once_in_an_order_of_its_own(source):
    files = ImageFiles(source)
    order = ImageSource(files, 3)
    epochs = [[order.number(sample) for sample in range(first, first + 13)] for first in (0, 13)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs) and epochs[0] != epochs[1]


@pytest.mark.parametrize("size, micro, number", [(1, 4, 2), (2, 2, 2), (1, 8, 1)])
def test_an_evaluation_has_every_image_once(source, size, micro, number):
    config, images = run(source, flip=1), []
    for first in range(0, 16, 8):
        for rank in range(size):
            pixels, targets = step(loader(config, False, micro, number, rank, size), first)
            images += [image.numpy().tobytes() for image, target in zip(pixels, targets) if target.sum() > 0]
            assert not pixels[targets.sum(1) == 0].any()
            assert set(targets.unique().tolist()) <= {0, 1}
    assert sorted(images) == sorted(image.tobytes() for image in made_up(13)[0])


def test_sources_are_mixed_by_weight(source, tmp_path):
    other = write_images(tmp_path / "other", *made_up(5), CLASSES)
    config = run(source)
    data = config.data.model_copy(update={"train": (DataSource(path=source, weight=3), DataSource(path=other))})
    sources = loader(config.model_copy(update={"data": data}), number=20).sample_sources(0)
    assert sources.count(0) == 30


def test_other_classes_are_refused(tmp_path, source):
    swapped = write_images(tmp_path / "swapped", *made_up(5), ("b", "a", *"cde"))
    more = write_images(tmp_path / "more", *made_up(5), (*CLASSES, "f", "g"))
    with pytest.raises(DataError) as error:
        open_images([DataSource(path=path) for path in (source, swapped, more)], 5)
    first, second = str(error.value).splitlines()
    assert (
        f"{swapped}.json: has other classes than {source}.json, or in another order ('b' for 'a', 'a' for 'b')" in first
    )
    assert f"--classes-from {source}" in first
    assert f"{more}.json: 7 classes (beyond: 'f', 'g'), model.image.classes is 5. Set it to 7" in second


def test_text_is_no_image_and_images_are_no_text(tmp_path, source):
    write_tokens(tmp_path / "text")
    (tmp_path / "text.json").write_text('{"format": "megatron_tf corpus 1"}')
    with pytest.raises(DataError, match="text.json: holds 'megatron_tf corpus 1', and not images"):
        ImageFiles(tmp_path / "text")
    with pytest.raises(DataError, match="holds images, and not text"):
        open_tokens(source, 1000)


def test_a_damaged_image_is_named_by_its_number(tmp_path):
    images, labels = made_up(3)
    from megatron_tf.data.images.decode import png

    contents = [png(images[0]), b"no image at all", png(images[2])]
    config = run(write_contents(tmp_path / "bad", contents, labels[:3], CLASSES))
    with pytest.raises(DataError, match=r"bad.bin: image 1 cannot be read: cannot identify image file"):
        step(loader(config))


def test_files_that_do_not_belong_together(tmp_path, source):
    data_file(source).write_bytes(data_file(source).read_bytes()[:-1])
    with pytest.raises(DataError):
        ImageFiles(source)


def test_what_can_hardly_be_meant_is_said(source):
    line, warnings = IMAGE_DATA.open(run(source)).outlook(130)
    assert line == f"13 images in {source}: 10 epochs"
    assert any("is training data too" in warning for warning in warnings)


def test_images_of_two_data_sets_are_compared_byte_for_byte(tmp_path, source):
    images, labels = made_up(20)
    some = write_images(tmp_path / "some", [*images[:3], images[2], images[2] + 1], [*labels[:3], 0, 0], CLASSES)
    files, others = ImageFiles(some), ImageFiles(source)
    assert count_duplicates(files, others) == 4 and count_duplicates(others, others) == len(others)
    assert count_duplicates(ImageFiles(write_images(tmp_path / "new", [images[0] + 1], [0], CLASSES)), others) == 0


def test_the_checks_of_a_run_find_what_is_missing(tmp_path):
    config = run(str(tmp_path / "missing"))
    with pytest.raises(DataError, match=r"missing.json: No such file or directory. Prepare the images"):
        for check in IMAGE_DATA.checks(config):
            check()


def test_labels_are_those_of_the_images(source):
    pixels, targets = step(loader(run(source), number=7))
    by_content = {image.tobytes(): label for image, label in zip(*made_up(13))}
    assert [by_content[image.numpy().tobytes()] for image in pixels] == np.asarray(targets.argmax(1)).tolist()
