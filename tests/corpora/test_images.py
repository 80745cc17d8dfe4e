"""Fashion-MNIST out of its package, of which the tests make one of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from packing import deb

from megatron_tf.corpora.images import CLASSES, PACKAGE, fetch_fashion_mnist
from megatron_tf.corpora.packages import Downloads, UnavailableError
from megatron_tf.errors import DataError

FILES = [f"{half}-{kind}-ubyte.gz" for half in ("t10k", "train") for kind in ("images-idx3", "labels-idx1")]


class Shelf(Downloads):
    """Has one package, or none."""

    def __init__(self, folder: Path, package: Path | None):
        super().__init__(folder)
        self._package = package

    def debian(self, names, pins):
        assert names == [PACKAGE] and all(name.startswith(PACKAGE) for name in pins)
        if self._package is None:
            raise UnavailableError("needs apt, of Debian and its descendants")
        return self._package


def packed(folder: Path, files: list[str]) -> Path:
    content = {f"usr/share/datasets/fashion-mnist/{name}": name.encode() for name in files}
    path = folder / "package.deb"
    path.write_bytes(deb({**content, f"usr/share/doc/{PACKAGE}/copyright": b"Expat", "./usr/share/doc/x": b""}, "xz"))
    return path


def test_files_classes_and_licence_are_written(tmp_path):
    written = fetch_fashion_mnist(tmp_path / "out", Shelf(tmp_path / "kept", packed(tmp_path, FILES)))
    assert [path.name for path in written] == sorted([*FILES, "classes.txt", "LICENSE.txt"])
    assert (tmp_path / "out" / FILES[0]).read_text() == FILES[0]
    assert (tmp_path / "out" / "classes.txt").read_text().splitlines() == list(CLASSES)
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "Expat"


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(DataError, match="has 4 of the 5 files expected"):
        fetch_fashion_mnist(tmp_path / "out", Shelf(tmp_path / "kept", packed(tmp_path, FILES[:3])))
    with pytest.raises(
        DataError, match="dataset-fashion-mnist: cannot be fetched here: needs apt.*of the MNIST family"
    ):
        fetch_fashion_mnist(tmp_path / "out", Shelf(tmp_path / "kept", None))
