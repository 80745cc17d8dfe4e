"""Preparation of images: what is read, what is refused, and that it goes on where it stopped."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from images import made_up
from PIL import Image as Pictures

from megatron_tf.data.images.decode import png
from megatron_tf.data.images.prepare import ImageSettings, merge_images, prepare_images
from megatron_tf.data.images.source import ImageFiles
from megatron_tf.data.preparation.progress import ProgressDisplay
from megatron_tf.data.preparation.work import Share
from megatron_tf.errors import DataError

IMAGES, LABELS = made_up(6, classes=3)


def prepare(inputs, prefix: Path, merge: bool = False, **settings) -> tuple[dict, str]:
    shown = io.StringIO()
    inputs = tuple(map(str, inputs if isinstance(inputs, list) else [inputs]))
    command = merge_images if merge else prepare_images
    return command(ImageSettings(inputs, str(prefix), **settings), ProgressDisplay(shown)), shown.getvalue()


def contents(prefix: Path) -> list[tuple[int, bytes]]:
    files = ImageFiles(prefix)
    return [files.read(number) for number in range(len(files))]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Class folders zebra, ape, bee; hidden files and a folder within a class."""
    top = tmp_path / "in"
    for number, (image, label) in enumerate(zip(IMAGES, LABELS)):
        place = top / ("zebra", "ape", "bee")[label] / ("deep" if number == 5 else "")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.JPEG").write_bytes(png(image))
    (top / ".DS_Store").write_bytes(b"x")
    (top / "ape" / ".hidden").write_bytes(b"x")
    return top


def write_idx(folder: Path, name: str = "t", packed: bool = False, classes: int = 3) -> Path:
    images, labels = made_up(6, classes=classes)
    folder.mkdir(exist_ok=True)
    parts = {
        f"{name}-images-idx3-ubyte": struct.pack(">4I", 0x803, 6, 6, 6) + np.stack(images).tobytes(),
        f"{name}-labels-idx1-ubyte": struct.pack(">2I", 0x801, 6) + bytes(labels),
    }
    for file, content in parts.items():
        (folder / (file + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    return folder / (f"{name}-images-idx3-ubyte" + ".gz" * packed)


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_class_folders(folder, tmp_path):
    (summary,) = prepare(folder, tmp_path / "x")[0].values()
    assert (summary.images, summary.classes, summary.files) == (6, ("ape", "bee", "zebra"), (str(folder),))
    found = contents(tmp_path / "x")
    assert [label for label, _ in found] == [0, 0, 1, 1, 2, 2]
    assert sorted(content for _, content in found) == sorted(map(png, IMAGES))
    report = json.loads((tmp_path / "x.report.json").read_text())
    assert report["documents"] == 6 and report["skipped_records"] == 0
    assert not (tmp_path / "x.parts").exists()


@pytest.mark.parametrize("packed", [False, True])
def test_the_mnist_family(tmp_path, packed):
    names = tmp_path / "names.txt"
    names.write_text("shirt\n\nshoe\nbag\n")
    (summary,) = prepare(write_idx(tmp_path / "in", packed=packed), tmp_path / "x", classes=str(names))[0].values()
    assert summary.classes == ("shirt", "shoe", "bag")
    assert contents(tmp_path / "x") == [(label, png(image)) for label, image in zip(LABELS, IMAGES)]
    (numbers,) = prepare(write_idx(tmp_path / "in"), tmp_path / "y")[0].values()
    assert numbers.classes == ("0", "1", "2")


def test_webdataset_shards(tmp_path):
    shards = [
        write_tar(
            tmp_path / f"{n}.tar", {f"a/{n}.png": png(IMAGES[n]), f"a/{n}.cls": b"%d" % LABELS[n], f"a/{n}.json": b""}
        )
        for n in range(3)
    ]
    (summary,) = prepare(shards, tmp_path / "x", classes="3")[0].values()
    assert summary.images == 3 and contents(tmp_path / "x")[2] == (LABELS[2], png(IMAGES[2]))


def test_what_a_shard_lacks_is_named(tmp_path):
    members = {
        "1.png": png(IMAGES[0]), "2.cls": b"0", "3.png": png(IMAGES[0]), "3.cls": b"many",
        "4.png": png(IMAGES[0]), "4.cls": b"7", "5.png": png(IMAGES[0])[:60], "5.cls": b"0",
        "6.png": png(IMAGES[0]), "6.cls": b"1",
    }  # fmt: skip
    shard = write_tar(tmp_path / "s.tar", members)
    (summary,), shown = prepare(shard, tmp_path / "x", classes="3", on_error="skip")[0].values(), ""
    assert (summary.images, summary.skipped_records) == (1, 5), shown
    report = json.loads((tmp_path / "x.report.json").read_text())
    reasons = {sample["file"].rpartition(":")[2]: sample["reason"] for sample in report["samples"]}
    assert reasons["1"] == "the image has no 1.cls next to it" and reasons["2"] == "the class has no image next to it"
    assert reasons["3"] == "its class is b'many', and no number" and reasons["4"] == "its class is 7, but there are 3"
    assert report["skipped"] == {"bad_image": 2, "bad_label": 3}
    with pytest.raises(DataError, match=r"s.tar:1:1: the image has no 1.cls next to it. Correct or remove"):
        prepare(shard, tmp_path / "y", classes="3")


def test_a_damaged_shard_is_named_and_what_comes_before_is_read(tmp_path):
    """tarfile takes a damaged header, a missing end and an appended archive for the end."""
    members = {}
    for n in range(6):
        members |= {f"{n}.png": png(IMAGES[n]), f"{n}.cls": b"%d" % LABELS[n]}
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    (third,) = [member.offset for member in tarfile.open(tmp_path / "whole.tar") if member.name == "3.png"]
    damaged = bytearray(whole)
    damaged[third + 20] ^= 1
    packed = bytearray(gzip.compress(whole))
    packed[-6] ^= 1  # of the checksum
    for name, content, count, reason in (
        ("header.tar", bytes(damaged), 2, "a broken archive"),
        ("member.tar", whole[:third], 2, "the archive breaks off"),
        ("inside.tar", whole[: third + 300], 2, "the archive breaks off"),
        ("two.tar", whole + whole, 6, "data after the end of the archive"),
        ("sum.tar.gz", bytes(packed), 5, "the archive breaks off (CRC check failed"),
        ("both.tar.gz", 2 * gzip.compress(whole), 6, "data after the end of the archive"),
    ):
        (tmp_path / name).write_bytes(content)
        (summary,) = prepare(tmp_path / name, tmp_path / f"{name}_out", classes="3", on_error="skip")[0].values()
        assert (summary.images, summary.skipped_records) == (count, 1), name
        (sample,) = json.loads((tmp_path / f"{name}_out.report.json").read_text())["samples"]
        assert reason in sample["reason"], sample


def test_one_of_several_images_of_a_key_is_not_taken_for_it(tmp_path):
    members = {"a.png": png(IMAGES[0]), "a.seg.png": png(IMAGES[1]), "a.cls": b"0",
               "b.png": png(IMAGES[2]), "b.cls": b"1"}  # fmt: skip
    shard = write_tar(tmp_path / "s.tar", members)
    with pytest.raises(DataError, match=r"s.tar:a:1: 2 images have this key. Keep one of them"):
        prepare(shard, tmp_path / "x", classes="3")
    prepare(shard, tmp_path / "y", classes="3", on_error="skip")
    assert contents(tmp_path / "y") == [(1, png(IMAGES[2]))]


def write_parquet(path: Path, rows: list[tuple[bytes | None, int]], names: list[str] | None = None) -> Path:
    images = pyarrow.array([{"bytes": content, "path": "x.png"} for content, _ in rows])
    table = pyarrow.table({"image": images, "label": [label for _, label in rows]})
    if names:
        info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pyarrow.parquet.write_table(table, path)
    return path


def test_parquet_files_of_hugging_face(tmp_path):
    rows = [(png(image), label) for image, label in zip(IMAGES, LABELS)]
    files = [write_parquet(tmp_path / f"{n}.parquet", rows[3 * n : 3 * n + 3], ["a", "b", "c"]) for n in range(2)]
    (summary,) = prepare(files, tmp_path / "x")[0].values()
    assert summary.classes == ("a", "b", "c")
    assert contents(tmp_path / "x") == [(label, content) for content, label in rows]
    bad = write_parquet(tmp_path / "bad.parquet", [rows[0], (None, 0), (rows[1][0], 9)])
    with pytest.raises(DataError, match="has no names for its classes. Give --classes"):
        prepare(bad, tmp_path / "y")
    (summary,) = prepare(bad, tmp_path / "y", classes="3", on_error="skip")[0].values()
    assert (summary.images, summary.skipped_records) == (1, 2)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(DataError, match="has no column 'image', its columns are text"):
        prepare(tmp_path / "text.parquet", tmp_path / "z")
    files[0].write_bytes(files[0].read_bytes()[:200])
    with pytest.raises(DataError, match="broken Parquet data"):
        prepare(files[0], tmp_path / "z", classes="3")


def test_classes_from_others_keep_their_numbers(folder, tmp_path):
    prepare(folder, tmp_path / "x")
    for file in (folder / "ape").rglob("*.JPEG"):
        file.unlink()
    with pytest.raises(DataError, match=r"in/ape: has no image. Put some into it, or remove the folder"):
        prepare(folder, tmp_path / "y")
    (folder / "ape" / ".hidden").unlink()
    (folder / "ape").rmdir()
    prepare(folder, tmp_path / "y", classes_from=str(tmp_path / "x"))
    assert {label for label, _ in contents(tmp_path / "y")} == {1, 2}
    (folder / "bee").rename(folder / "yak")
    with pytest.raises(DataError, match=r"in/yak: is none of the 3 classes, which begin with ape, bee, zebra"):
        prepare(folder, tmp_path / "z", classes_from=str(tmp_path / "x"))


def test_large_images_are_made_smaller_and_turned(tmp_path):
    exif = Pictures.Exif()
    exif[0x0112] = 6
    for number, name in enumerate("ab"):
        (tmp_path / "in" / name).mkdir(parents=True)
        Pictures.new("RGB", (40, 20), (9, 99, 199)).save(tmp_path / "in" / name / f"{number}.jpg", exif=exif)
    sizes = {}
    for name, options in {"as": {"ignore_orientation": True}, "turned": {}, "small": {"shortest_side": 10}}.items():
        prepare(tmp_path / "in", tmp_path / name, **options)
        sizes[name] = Pictures.open(io.BytesIO(contents(tmp_path / name)[0][1])).size
    assert sizes == {"as": (40, 20), "turned": (20, 40), "small": (10, 20)}


def test_grey_images_stay_grey_when_they_are_made_smaller(tmp_path):
    grey = np.arange(40 * 40).reshape(40, 40)
    (tmp_path / "in" / "b").mkdir(parents=True)
    (tmp_path / "in" / "a").mkdir()
    Pictures.fromarray((40 * grey).astype(np.uint16)).save(tmp_path / "in" / "a" / "deep.png")
    Pictures.fromarray((grey % 256).astype(np.uint8)).convert("LA").save(tmp_path / "in" / "b" / "alpha.png")
    prepare(tmp_path / "in", tmp_path / "x", shortest_side=10)
    for _, content in contents(tmp_path / "x"):
        small = Pictures.open(io.BytesIO(content))
        assert (small.mode, small.size, small.format) == ("L", (10, 10), "PNG")


def test_a_share_is_held_out(folder, tmp_path):
    prefixes, _ = prepare(folder, tmp_path / "x", validation_fraction=0.5)
    assert set(prefixes) == {f"{tmp_path}/x_train", f"{tmp_path}/x_validation"}
    assert sum(summary.images for summary in prefixes.values()) == 6


@pytest.mark.slow
def test_workers_and_shards_do_not_change_the_output(folder, tmp_path):
    prepare(folder, tmp_path / "x")
    prepare(folder, tmp_path / "workers", share=Share(workers=3))
    for number in range(2):
        prefixes, shown = prepare(folder, tmp_path / "shards", share=Share(1, number, 2))
        assert bool(prefixes) == bool(number), shown
    for ending in (".bin", ".idx", ".json"):
        expected = Path(f"{tmp_path}/x{ending}").read_bytes()
        assert Path(f"{tmp_path}/workers{ending}").read_bytes() == expected
        assert Path(f"{tmp_path}/shards{ending}").read_bytes() == expected


def test_it_goes_on_where_it_stopped(folder, tmp_path):
    bad = folder / "zebra" / "9.JPEG"
    bad.write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"9.JPEG:1: cannot identify image file"):
        prepare(folder, tmp_path / "x")
    bad.write_bytes(png(IMAGES[0]))
    _, shown = prepare(folder, tmp_path / "x")
    assert "finished before: 6 of 7 parts" in shown
    assert "was prepared from the same files" in prepare(folder, tmp_path / "x")[1]
    (folder / "ape" / "1.JPEG").unlink()
    with pytest.raises(DataError, match="have it replaced with --replace"):
        prepare(folder, tmp_path / "x")
    prepare(folder, tmp_path / "x", replace=True)
    with pytest.raises(DataError, match="parts are still to be prepared"):
        prepare(folder, tmp_path / "new", merge=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda top: (top / "readme.txt").write_text("x"), "readme.txt: is in no class; each image stands in a folder"),
        (lambda top: [file.unlink() for file in (top / "bee").rglob("*.JPEG")], "bee: has no image"),
        (lambda top: [file.write_text("x") for file in (top / "bee").rglob("*.JPEG")], "in/bee: has no image"),
        (
            lambda top: [file.unlink() for name in ("ape", "bee") for file in (top / name).rglob("*.JPEG")],
            "in/ape, .*in/bee: have no image. Put some into it, or remove these folders",
        ),
        (lambda top: (top / "ape" / "x.txt").write_text("text"), "x.txt:1: cannot identify image file"),
    ],
)
def test_folders_that_are_refused(folder, tmp_path, change, message):
    change(folder)
    with pytest.raises(DataError, match=message):
        prepare(folder, tmp_path / "x")
    assert not (tmp_path / "x.bin").exists()


@pytest.mark.parametrize("given", ["0", "1", "9" * 30, "names"])
def test_classes_that_cannot_be(folder, tmp_path, given):
    """They were taken from the folders instead, or counted to."""
    names = tmp_path / "names"
    names.write_text("ape\n")
    classes = str(names) if given == "names" else given
    with pytest.raises(DataError, match=f"--classes: {classes}: 2 to 1,000,000 classes can be told apart"):
        prepare(folder, tmp_path / "x", classes=classes)
    with pytest.raises(DataError, match="names: 2 to 1,000,000 classes can be told apart, and the file names 1. Give"):
        prepare(folder, tmp_path / "x", classes=str(names))
    names.write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match="names: byte 0 is not UTF-8 text"):
        prepare(folder, tmp_path / "x", classes=str(names))


def test_files_that_are_refused(tmp_path):
    images = write_idx(tmp_path / "in")
    with pytest.raises(DataError, match="in: has 0 folders|is in no class"):
        prepare(tmp_path / "in", tmp_path / "x")
    with pytest.raises(DataError, match="is neither a .tar nor a .parquet nor a file of images"):
        prepare(tmp_path / "in" / "t-labels-idx1-ubyte", tmp_path / "x")
    with pytest.raises(DataError, match="numbers of classes and not their names. Give --classes"):
        prepare(write_tar(tmp_path / "s.tar", {"1.png": b""}), tmp_path / "x")
    with pytest.raises(DataError, match="its class is 2, but there are 2"):
        prepare(images, tmp_path / "x", classes="2")
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"says it is \[6, 6, 6\], but 215 bytes follow"):
        prepare(images, tmp_path / "x")
    (tmp_path / "in" / "t-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="has no labels next to it: .*t-labels-idx1-ubyte"):
        prepare(images, tmp_path / "x")
    names = tmp_path / "names"
    names.write_text("a\nb\na\n")
    with pytest.raises(DataError, match="names 'a' twice"):
        prepare(images, tmp_path / "x", classes=str(names))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (struct.pack(">4I", 0x803, 6, 0, 6), None, r"t-images-idx3-ubyte: says it is \[6, 0, 6\], .* no pixels. Copy"),
        (None, b"", "t-labels-idx1-ubyte: .* MNIST family: it is empty, and 00000801 is expected. Copy it again"),
        (None, b"\0\0\x08\x03", "t-labels-idx1-ubyte: .* it begins with 00000803, and 00000801 is expected. Copy"),
        (None, struct.pack(">2I", 0x801, 2) + b"\0\1", "has 6 images, .* has 2 labels. Copy both files of one data"),
    ],
)
def test_files_of_the_mnist_family_that_are_damaged(tmp_path, images, labels, message):
    path = write_idx(tmp_path / "in")
    if images is not None:
        path.write_bytes(images)
    if labels is not None:
        (tmp_path / "in" / "t-labels-idx1-ubyte").write_bytes(labels)
    with pytest.raises(DataError, match=message):
        prepare(path, tmp_path / "x")
    assert not list(tmp_path.glob("x*"))


@pytest.mark.parametrize("damage", ["cut", "checksum", "content"])
def test_a_packed_file_that_is_damaged(tmp_path, damage):
    path = write_idx(tmp_path / "in", packed=True)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    else:
        content[-8 if damage == "checksum" else len(content) // 2] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"t-images-idx3-ubyte.gz: is damaged \(.*\). Copy it again"):
        prepare(path, tmp_path / "x")


def test_links_to_folders(folder, tmp_path):
    """One that leads back was followed until the system refused, and two of them would have taken years."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "7.png").write_bytes(png(IMAGES[0]))
    (folder / "ape" / "link").symlink_to(tmp_path / "more")
    assert prepare(folder, tmp_path / "x")[0][str(tmp_path / "x")].images == 7
    for place, target in ((folder / "ape" / "back", ".."), (folder / "back", "."), (folder / "bee" / "up", tmp_path)):
        place.symlink_to(target)
        with pytest.raises(DataError, match=f"{place}: is a link to {target}, a folder that it stands in itself. Rem"):
            prepare(folder, tmp_path / "y")
        place.unlink()
    (folder / "ape" / "other").symlink_to("../bee")
    (folder / "bee" / "other").symlink_to("../ape")
    with pytest.raises(DataError, match="ape/other/other: is a link to ../ape, a folder that it stands in itself"):
        prepare(folder, tmp_path / "y")


def test_what_is_no_file_keeps_nobody_waiting(folder, tmp_path):
    os.mkfifo(folder / "ape" / "0.png")
    with pytest.raises(DataError, match="0.png: is a FIFO, where a file is expected"):
        prepare(folder, tmp_path / "x")
    path = write_idx(tmp_path / "idx")
    (tmp_path / "idx" / "t-labels-idx1-ubyte").unlink()
    os.mkfifo(tmp_path / "idx" / "t-labels-idx1-ubyte")
    with pytest.raises(DataError, match="t-labels-idx1-ubyte: is a FIFO, where a file is expected"):
        prepare(path, tmp_path / "x")


def test_an_empty_file_is_said_to_be_empty(folder, tmp_path):
    (folder / "ape" / "9.png").touch()
    with pytest.raises(DataError, match="9.png:1: the file is empty. Correct or remove the record"):
        prepare(folder, tmp_path / "x")


def test_one_folder_stands_alone(folder, tmp_path):
    with pytest.raises(DataError, match="in: is a folder, and 2 inputs are given. Give one folder with a folder for"):
        prepare([write_tar(tmp_path / "s.tar", {"1.png": b""}), folder], tmp_path / "x", classes="2")


def test_without_pillow_it_says_what_to_install(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(Exception, match=r"Pillow is missing, which reads images. pip install 'megatron_tf\[images\]'"):
        prepare(folder, tmp_path / "x")
