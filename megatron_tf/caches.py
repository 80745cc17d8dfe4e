"""Cache folders, our own and those of libraries.

A cache that cannot be written ends no command: a private folder among the temporary files takes its place. This happens
with a read-only shared folder, or in a container whose user has neither a name nor a home folder. Libraries read their
environment variables when they are imported or first used, so their caches are prepared before that.
"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from collections.abc import MutableMapping
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

# Variable -> folder below HF_HOME. The downloads (HF_HUB_CACHE) are not in this table: a read-only copy is enough.
HUGGING_FACE = {"HF_DATASETS_CACHE": "datasets", "HF_MODULES_CACHE": "modules", "HF_EVALUATE_CACHE": "evaluate"}


def user_cache(environ: MutableMapping[str, str] = os.environ) -> Path | None:
    """The user's folder for caches. None for a user without a home folder."""
    folders = [Path(environ.get("XDG_CACHE_HOME", ""))]
    with suppress(RuntimeError):  # no HOME, and no entry in /etc/passwd
        folders.append(Path.home() / ".cache")
    # A relative path would name another folder wherever the command is started.
    return next((folder for folder in folders if folder.is_absolute()), None)


def can_write(folder: Path) -> bool:
    """Whether files can be written into `folder`. It is created if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def temporary_cache(name: str) -> Path:
    """A private folder of this user among the temporary files, usually the same in later processes.

    OSError when it cannot be created.
    """
    root = Path(tempfile.gettempdir(), f"megatron_tf-{os.geteuid()}")
    with suppress(FileExistsError):
        root.mkdir(mode=0o700)
    found = os.lstat(root)
    is_private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
    # Another user may have created a folder of this name, and files in caches are loaded as code.
    folder = (root if is_private else Path(tempfile.mkdtemp(prefix="megatron_tf-"))) / name
    folder.mkdir(exist_ok=True)
    return folder


def prepare_hugging_face(environ: MutableMapping[str, str] = os.environ) -> None:
    """Replace folders that cannot be written. Call before datasets, lm_eval or transformers are imported."""
    named = environ.get("HF_HOME")
    cache = user_cache(environ)
    home = Path(named).expanduser() if named else cache / "huggingface" if cache is not None else None
    if home is None or not (home.is_dir() or can_write(home)):
        home = _replace("HF_HOME", "huggingface", environ)
    for variable, name in HUGGING_FACE.items():
        folder = Path(environ[variable]) if environ.get(variable) else home / name
        if not can_write(folder):
            _replace(variable, f"huggingface-{name}", environ)


def prepare_compiler(environ: MutableMapping[str, str] = os.environ) -> None:
    """Call before importing torch.compile, which DeepSpeed does. Its default is a folder among the temporary files."""
    named = environ.get("TORCHINDUCTOR_CACHE_DIR")
    if named and not can_write(Path(named)):
        _replace("TORCHINDUCTOR_CACHE_DIR", "inductor", environ)


def prepare_triton(environ: MutableMapping[str, str] = os.environ) -> None:
    """Call before Triton compiles anything. Its default is a folder in HOME."""
    named = environ.get("TRITON_CACHE_DIR")
    if named and not can_write(Path(named)):
        _replace("TRITON_CACHE_DIR", "triton", environ)
    if not environ.get("TRITON_CACHE_DIR") and not environ.get("TRITON_HOME"):
        try:
            is_usable = can_write(Path.home() / ".triton")
        except RuntimeError:
            is_usable = False
        if not is_usable:
            environ["TRITON_CACHE_DIR"] = str(temporary_cache("triton"))


@cache
def has_triton() -> bool:
    """Whether Triton is installed. If it is, the first call prepares its cache."""
    if find_spec("triton") is None:
        return False
    prepare_triton()
    return True


def _replace(variable: str, name: str, environ: MutableMapping[str, str]) -> Path:
    folder = temporary_cache(name)
    if named := environ.get(variable):
        logging.getLogger(__name__).warning("%s=%s cannot be written: %s is used instead", variable, named, folder)
    environ[variable] = str(folder)
    return folder
