"""Reads images from class folders, the files of the MNIST family, and tar shards as WebDataset has them.

A record is a class (i32) and the bytes of an image file. Its `line` is the number of the image in its file, from 1.
"""

from __future__ import annotations

import gzip
import os
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from megatron_tf.data.images.decode import BadImage, opened, png
from megatron_tf.data.images.source import LABEL
from megatron_tf.data.preparation.formats import StrictMember, check_end
from megatron_tf.data.preparation.record_types import BadRecord, RawRecord, bad_raw
from megatron_tf.durable import open_plain, read_plain
from megatron_tf.errors import DataError, UserError, file_errors
from megatron_tf.telemetry.text import count_of
from megatron_tf.text_files import read_text_file

IMAGES_MAGIC, LABELS_MAGIC = 0x0803, 0x0801
LABEL_SUFFIX = ".cls"
MOST_IMAGE_BYTES = 1 << 30
NAMED = 8  # folders that a message names
NOT_IMAGES = (".json", ".txt")  # members of a tar that accompany an image and are ignored
REMEDY = "Make it readable, or leave it out."


def folder_records(
    paths: Iterable[Path], *, classes: Mapping[str, int], on_read: Callable[[int], None]
) -> Iterator[RawRecord]:
    """One record per file. `classes`: folder -> number of its class."""
    for path in paths:
        content = image_file(DataError, path, REMEDY)
        on_read(len(content))
        label = next(classes[str(parent)] for parent in path.parents if str(parent) in classes)
        yield _record(str(path), 1, label, content)


def idx_records(paths: Iterable[Path], *, num_classes: int, on_read: Callable[[int], None]) -> Iterator[RawRecord]:
    """Records of MNIST-style files of images, each with a file of as many labels next to it."""
    for path in paths:
        images, labels = read_idx(path, IMAGES_MAGIC), read_labels(path)
        if len(images) != len(labels):
            raise DataError(
                f"{path}: has {len(images)} images, {labels_file(path)} has {len(labels)} labels. Copy both files of "
                "one data set."
            )
        for number, (image, label) in enumerate(zip(images, labels.tolist()), 1):
            yield _checked(str(path), number, label, num_classes, partial(png, image))
        on_read(os.stat(path).st_size)


def tar_records(paths: Iterable[Path], *, num_classes: int, on_read: Callable[[int], None]) -> Iterator[RawRecord]:
    """Records of tar archives in which KEY.jpg (or another ending) and KEY.cls, image and class, are neighbours.

    An archive that is damaged, or has another one appended, is a bad record; the images before the damage are read.
    """
    for path in paths:
        # Of gzip tarfile itself would compare no checksum, and stop where another file was appended.
        with file_errors(DataError, path, REMEDY), _plain(path) as file:
            try:
                with tarfile.open(fileobj=file, mode="r|*", tarinfo=StrictMember) as archive:
                    yield from _pairs(str(path), archive, num_classes)
                    check_end(archive)
            except BadRecord as problem:
                yield bad_raw(str(path), 1, problem)
            except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
                yield bad_raw(str(path), 1, BadRecord("truncated", f"the archive breaks off ({error})"))
        on_read(os.stat(path).st_size)


def _pairs(file: str, archive: tarfile.TarFile, num_classes: int) -> Iterator[RawRecord]:
    number, key, images = 0, "", 0
    content: bytes | None = None
    label: bytes | None = None

    def pair() -> Iterator[RawRecord]:
        place = f"{file}:{key}"
        if images > 1:
            yield bad_raw(place, number, BadRecord("bad_image", f"{images} images have this key. Keep one of them"))
        elif content is not None and label is not None:
            yield _with_text_label(place, number, label, num_classes, content)
        elif content is not None:
            yield bad_raw(place, number, BadRecord("bad_label", f"the image has no {key}{LABEL_SUFFIX} next to it"))
        elif label is not None:
            yield bad_raw(place, number, BadRecord("bad_image", "the class has no image next to it"))

    for member in archive:
        base = os.path.basename(member.name)
        if not member.isreg() or base.startswith("."):
            continue
        stem, dot, ending = base.partition(".")
        own = os.path.join(os.path.dirname(member.name), stem)
        if own != key:
            yield from pair()
            number, key, content, label, images = number + 1, own, None, None, 0
        stream = archive.extractfile(member)
        assert stream is not None
        if dot + ending == LABEL_SUFFIX:
            label = stream.read()
        elif not ending.endswith(NOT_IMAGES) and dot + ending not in NOT_IMAGES:
            content, images = stream.read(), images + 1
    yield from pair()


def _with_text_label(file: str, line: int, text: bytes, num_classes: int, content: bytes) -> RawRecord:
    try:
        label = int(text)
    except ValueError:
        return bad_raw(file, line, BadRecord("bad_label", f"its class is {text[:20]!r}, and no number"))
    return _checked(file, line, label, num_classes, lambda: content)


def _checked(file: str, line: int, label: int, num_classes: int, content: Callable[[], bytes]) -> RawRecord:
    if not 0 <= label < num_classes:
        return bad_raw(file, line, BadRecord("bad_label", f"its class is {label}, but there are {num_classes}"))
    return _record(file, line, label, content())


def _record(file: str, line: int, label: int, content: bytes) -> RawRecord:
    return RawRecord(file, line, LABEL.pack(label) + content)


def is_idx(path: Path) -> bool:
    """Whether `path` is a file of images of the MNIST family, by its first bytes; it may be compressed with gzip."""
    try:
        with _plain(path) as file:
            return file.read(4) == IMAGES_MAGIC.to_bytes(4, "big")
    except (OSError, EOFError, zlib.error):
        return False


def read_idx(path: Path, magic: int) -> np.ndarray:
    """Images uint8 [n, h, w] or labels [n], by `magic`. DataError for another kind of file, and a truncated one."""
    with file_errors(DataError, path, REMEDY), _plain(path) as file:
        try:
            content = file.read()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path}: is damaged ({error}). Copy it again.") from None
    axes = magic & 0xFF
    start = 4 + 4 * axes
    if len(content) < start or content[:4] != magic.to_bytes(4, "big"):
        kind = "images" if magic == IMAGES_MAGIC else "labels"
        found = f"begins with {content[:4].hex()}" if content else "is empty"
        raise DataError(
            f"{path}: is no file of {kind} of the MNIST family: it {found}, and {magic:08x} is expected. Copy it again."
        )
    shape = struct.unpack(f">{axes}I", content[4:start])
    if len(content) - start != np.prod(shape, dtype=np.int64):
        raise DataError(f"{path}: says it is {list(shape)}, but {len(content) - start} bytes follow. Copy it again.")
    if 0 in shape[1:]:
        raise DataError(f"{path}: says it is {list(shape)}, so its images have no pixels. Copy it again.")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def read_labels(path: Path) -> np.ndarray:
    """Labels uint8 [n] of the images in `path`. DataError as `labels_file` and `read_idx`."""
    return read_idx(labels_file(path), LABELS_MAGIC)


def labels_file(path: Path) -> Path:
    """The file with the labels of the images in `path`. DataError when there is none."""
    name = path.name.replace("images", "labels").replace("idx3", "idx1")
    if name == path.name or not path.with_name(name).exists():
        raise DataError(
            f"{path}: has no labels next to it: "
            f"{path.with_name(name) if name != path.name else 'its name has no images'}. Put both files into one "
            "folder, under the names of the MNIST family."
        )
    return path.with_name(name)


def image_file(kind: type[UserError], path: Path, remedy: str) -> bytes:
    """The content of a file that should be an image.

    Raises `kind` with `remedy` when it cannot be read or is not a plain file: reading a FIFO would wait for ever.
    """
    with file_errors(kind, path, remedy):
        return read_plain(path, MOST_IMAGE_BYTES)


def _plain(path: Path) -> IO[bytes]:
    with open_plain(path) as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if packed else open(path, "rb")  # type: ignore[return-value]


def class_folders(top: Path) -> dict[str, list[Path]]:
    """Name of each class -> its files, both in alphabetical order, those in folders below the class included.

    Hidden files are left out. DataError for files outside of all classes, for classes in which no file is an image, for
    fewer than two classes, and for a link to a folder around it.
    """
    with file_errors(DataError, top, REMEDY):
        entries = sorted((entry for entry in top.iterdir() if not entry.name.startswith(".")), key=lambda e: e.name)
    loose = [entry for entry in entries if not entry.is_dir()]
    if loose:
        raise DataError(
            f"{loose[0]}: is in no class; each image stands in a folder that is named after its class. Move it, or "
            "give another folder."
        )
    for entry in entries:
        _check_leads_on(str(entry))
    found = {entry.name: list(_files_below(entry)) for entry in entries}
    empty = [str(top / name) for name, files in found.items() if not any(map(_is_image, files))]
    if empty:
        more = f" and {len(empty) - NAMED} more" if len(empty) > NAMED else ""
        has, folder = ("has", "the folder") if len(empty) == 1 else ("have", "these folders")
        raise DataError(
            f"{', '.join(empty[:NAMED])}{more}: {has} no image. Put some into it, or remove {folder}; --classes and "
            "--classes-from also name classes without a folder."
        )
    if len(found) < 2:
        raise DataError(
            f"{top}: has {count_of(len(found), 'folder')}, but a class is a folder, and two are needed at least."
        )
    return found


def _is_image(path: Path) -> bool:
    content = image_file(DataError, path, REMEDY)
    try:
        opened(content)
    except BadImage:
        return False
    return True


def _files_below(folder: Path) -> Iterator[Path]:
    for where, below, names in os.walk(folder, onerror=_raise, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in below:
            _check_leads_on(os.path.join(where, name))
        yield from (Path(where, name) for name in sorted(names) if not name.startswith("."))


def _check_leads_on(path: str) -> None:
    """DataError for a link to a folder that contains it: its files would be found over and over."""
    if not os.path.islink(path):
        return
    above = Path(path).absolute().parents
    if os.path.realpath(path) in map(os.path.realpath, above):
        raise DataError(
            f"{path}: is a link to {os.readlink(path)}, a folder that it stands in itself. Remove the link."
        )


def _raise(error: OSError) -> None:
    raise DataError(f"{error.filename}: {error.strerror}. {REMEDY}")


def read_names(path: Path) -> tuple[str, ...]:
    """The classes in a file with one name a line."""
    lines = read_text_file(DataError, path, "Give a file with one name a line, or how many there are.").splitlines()
    names = tuple(line.strip() for line in lines if line.strip())
    _check_distinct(path, names)
    return names


def _check_distinct(path: Path, names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DataError(f"{path}: names {name!r} twice. Give each class a name of its own.")
        seen.add(name)
