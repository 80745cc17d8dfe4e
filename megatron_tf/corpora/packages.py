"""Downloads packages through pip and apt, and verifies them. They are neither installed nor run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_tf.durable import write_atomically
from megatron_tf.errors import NOT_AS_WRITTEN, DataError

COMMAND_SECONDS = 1200  # a package manager that takes longer has most likely lost its network
RECORD = "downloads.json"  # file name -> SHA-256 of that file
# pip asks the archive's build backend for metadata; for old archives setuptools would run their setup.py. This module
# stands in for setuptools, so that nothing from the archive is run.
BUILDER = """
import os

class Builder:
    def get_requires_for_build_wheel(self, config_settings=None):
        return []

    def prepare_metadata_for_build_wheel(self, folder, config_settings=None):
        os.makedirs(os.path.join(folder, "{name}-{version}.dist-info"))
        with open(os.path.join(folder, "{name}-{version}.dist-info", "METADATA"), "w") as file:
            file.write("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
        return "{name}-{version}.dist-info"

__legacy__ = Builder()
"""


class UnavailableError(Exception):
    """A package cannot be fetched on this machine; the message says why."""


class Downloads:
    """A folder of packages. One that is there, unchanged since it was downloaded, is not fetched again."""

    def __init__(self, folder: Path):
        # apt runs in a folder of its own, where a relative path would mean another place.
        self.folder = folder.absolute()

    def sdist(self, name: str, version: str, sha256: str) -> Path:
        """The path of a source archive from PyPI. Raises `UnavailableError`; `DataError` for another SHA-256."""
        file = f"{name}-{version}.tar.gz"
        if (kept := self._kept([file])) is not None:
            return kept
        with tempfile.TemporaryDirectory(dir=self.folder) as work:
            builder = Path(work) / "builder" / "setuptools"
            builder.mkdir(parents=True)
            (builder / "__init__.py").touch()
            (builder / "build_meta.py").write_text(BUILDER.format(name=name, version=version))
            (Path(work) / "requirements.txt").write_text(f"{name}=={version} --hash=sha256:{sha256}\n")
            options = ["--no-input", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--use-pep517"]
            _run(
                [sys.executable, "-m", "pip", "download", *options, "--dest", work, "-r", f"{work}/requirements.txt"],
                {"PYTHONPATH": os.pathsep.join(filter(None, [str(builder.parent), os.environ.get("PYTHONPATH")]))},
                # pip runs in the current folder: relative paths in its variables and configuration count from there
                None,
            )
            return self._take(Path(work) / file, sha256)

    def debian(self, names: Sequence[str], pins: Mapping[str, str]) -> Path:
        """The path of the .deb of the first of `names` that apt knows. `pins`: SHA-256 of some files by name.

        A file that is not pinned is checked against apt's own signed lists. Raises `UnavailableError`; `DataError` for
        another SHA-256.
        """
        if (kept := self._kept([f"{name}_" for name in names])) is not None:
            return kept
        if shutil.which("apt-get") is None or shutil.which("apt-cache") is None:
            raise UnavailableError("needs apt, of Debian and its descendants")
        name, fields = _first_known(names)
        with tempfile.TemporaryDirectory(dir=self.folder) as work:
            _run(["apt-get", "download", "-o", "APT::Sandbox::User=root", f"{name}={fields['Version']}"], {}, work)
            found = list(Path(work).glob("*.deb"))
            if len(found) != 1:
                raise UnavailableError(f"apt-get download {name} left {len(found)} packages")
            return self._take(found[0], pins.get(found[0].name, fields["SHA256"]))

    def _kept(self, beginnings: Sequence[str]) -> Path | None:
        recorded = self._recorded()
        for beginning in beginnings:
            for file, sha256 in sorted(recorded.items()):
                path = self.folder / file
                if file.startswith(beginning) and path.is_file() and sha256_of(path) == sha256:
                    return path
        return None

    def _recorded(self) -> dict[str, str]:
        try:
            recorded = json.loads((self.folder / RECORD).read_bytes())
        except (FileNotFoundError, *NOT_AS_WRITTEN):
            return {}
        return recorded if isinstance(recorded, dict) else {}

    def _take(self, path: Path, expected: str) -> Path:
        found = sha256_of(path)
        if found != expected:
            raise DataError(
                f"{path.name}: has SHA-256 {found[:16]}..., expected is {expected[:16]}... It was damaged or replaced "
                f"on its way: run again, or leave its source out with --sources."
            )
        target = self.folder / path.name
        os.replace(path, target)
        record = json.dumps({**self._recorded(), path.name: found}, indent=1, sort_keys=True)
        write_atomically(self.folder / RECORD, record.encode())
        return target


def _first_known(names: Sequence[str]) -> tuple[str, dict[str, str]]:
    """(name, fields of the newest version) of the first package that apt knows. Raises `UnavailableError`."""
    for name in names:
        try:
            shown = _run(["apt-cache", "show", "--no-all-versions", name], {}, None)
        except UnavailableError:
            continue
        pairs = (line.partition(": ") for line in shown.splitlines() if line[:1].strip())
        fields = {key: value for key, _, value in pairs}
        if {"SHA256", "Version"} <= fields.keys():
            return name, fields
    raise UnavailableError(f"apt knows no package {' or '.join(names)}; apt-get update may help")


def _run(command: Sequence[str], variables: Mapping[str, str], folder: str | None) -> str:
    """What `command` prints to stdout. Raises `UnavailableError` with its last line of error."""
    environment = {**os.environ, "LC_ALL": "C", **variables}
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMMAND_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{Path(command[0]).name} gave no answer in {COMMAND_SECONDS} seconds") from None
    if done.returncode != 0:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("ERROR: ", "E: ")) or "No module named pip" in line]
        raise UnavailableError((errors or lines or [f"exit code {done.returncode}"])[-1])
    return done.stdout


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
