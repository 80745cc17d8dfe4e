"""Files and folders that exist whole or not at all: written under a temporary name, synced to disk, then renamed."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader, FileIO
from pathlib import Path

from megatron_tf.errors import UserError, broken_link, file_errors, write_errors, write_remedy

LOCK_SECONDS = 5.0  # a killed process's helpers may hold their locks a moment longer
WRITING_SECONDS = 60.0  # that a writer of a file waits for another one
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class NotPlainError(OSError):
    """The path of a file to read is that of a FIFO, a socket or a device."""


def plain_size(path: str | os.PathLike[str]) -> int:
    """Size in bytes of a file, or of the file that a link leads to. OSError for anything else."""
    found = os.stat(path)
    kind = stat.S_IFMT(found.st_mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if kind != stat.S_IFREG:
        raise NotPlainError(
            errno.EINVAL, f"is {_KINDS.get(kind, 'no file')}, where a file is expected", os.fspath(path)
        )
    return found.st_size


def open_plain(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a file, or the file that a link leads to, for reading.

    OSError for anything else, without opening it: reading a FIFO or a device may wait or go on for ever.
    """
    plain_size(path)
    return open(path, "rb")


def read_plain(path: str | os.PathLike[str], limit: int) -> bytes:
    """The content of a file, see `open_plain`. OSError also when it has more than `limit` bytes."""
    with open_plain(path) as file:
        content = file.read(limit + 1) if os.fstat(file.fileno()).st_size <= limit else None
    if content is None or len(content) > limit:
        raise OSError(errno.EFBIG, f"is larger than {limit:,} bytes, which no such file is", os.fspath(path))
    return content


def partial_path(path: Path) -> Path:
    """The name under which `path` is written. It is always the same, so a rerun reuses what a killed run left."""
    return path.with_name(path.name + ".partial")


@contextmanager
def new_file(path: Path) -> Iterator[FileIO]:
    """A new file, open for unbuffered writing; synced to disk when the block ends. FileExistsError if `path` exists."""
    with open(path, "xb", buffering=0) as file:
        yield file
        os.fsync(file.fileno())


def publish(temporary: Path, final: Path) -> None:
    """Sync `temporary` to disk, then give it the name `final`, replacing an older file of that name.

    The new name itself is on disk only after `sync_folder`; until then a power cut may bring the older file back.
    """
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield the temporary name to write; publish it as `path` on success, delete it when the block raises.

    Writers of one file take turns, because they share the temporary name. OSError when another one takes longer than
    WRITING_SECONDS. The temporary file is there already, perhaps with what a killed run left: open it with "wb". A
    block that replaces it, instead of writing into it, loses its turn.
    """
    temporary = partial_path(path)
    deadline = time.monotonic() + WRITING_SECONDS
    while (descriptor := _open_locked(temporary)) is None:
        if time.monotonic() > deadline:
            raise BlockingIOError(errno.EAGAIN, "another writer has it", str(path))
        time.sleep(0.05)
    try:
        yield temporary
        publish(temporary, path)
    except BaseException:
        with suppress(OSError):  # the caller must see the first error, not this one
            temporary.unlink()
        raise
    finally:
        os.close(descriptor)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new, empty folder to fill; on success sync its files to disk and rename it to `path`, else delete it.

    The folder may hold files only, no folders. FileExistsError when `path` exists, or when a killed run has left a
    folder under the temporary name.
    """
    temporary = partial_path(path)
    if path.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
        sync_folder(temporary)
        os.rename(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`. Readers see the old content or all of the new, never a part. Raises OSError."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def sync_folder(path: Path) -> None:
    """Sync the folder's entries (creations, renames, removals) to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prepare_output(path: Path) -> None:
    """Create the folder of the output file `path`, so that errors show before work is spent on its content.

    Raises `UserError` when the folder cannot be created or written to, and when `path` exists and is not a file.
    """
    with write_errors(UserError, path.parent, "Choose another folder."):
        path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{path.parent}: the output folder is not writable. Choose another or change its permissions.")
    with file_errors(UserError, path, "Choose another output."):
        if path.is_dir():
            raise UserError(f"{path}: is a folder, the output is a file. Choose another name.")
        if path.exists() and not path.is_file():
            raise UserError(
                f"{path}: is a device or a FIFO, which a file would take the place of. Choose another name."
            )
        partial_path(path).is_dir()  # raises when the name is too long with the ending of a temporary file


def check_writable(kind: type[UserError], folder: Path, remedy: str, key: str = "") -> None:
    """`kind` when the folder cannot be made, or takes no files, as far as can be told without writing.

    `remedy`: what helps in any case, such as "Choose another folder.".  `key`: with which the user named the folder.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    number, problem = _refusal(nearest)
    if problem:
        verb, place = ("written", "it") if nearest == folder and nearest.is_dir() else ("made", nearest)
        named = f"{key}: {folder}" if key else folder
        helps = write_remedy(OSError(number, ""), remedy)
        raise kind(f"{named} cannot be {verb}: {place} {problem}. {helps}")


def _refusal(place: Path) -> tuple[int, str]:
    """(The number of the error that a new entry of `place` would raise, the reason, which completes a sentence that
    begins with the path). "" when it would raise none."""
    if not place.is_dir():
        return errno.ENOTDIR, broken_link(place) or ("is a file" if place.is_file() else "is no folder")
    found = os.statvfs(place)
    if found.f_flag & os.ST_RDONLY:
        return errno.EROFS, "is on a read-only file system"
    if not os.access(place, os.W_OK | os.X_OK):
        return errno.EACCES, "does not let you write"
    # folders of the kernel, such as /proc: root passes the test of permissions, and still nothing can be made there
    if found.f_blocks == 0 and not stat.S_IMODE(place.stat().st_mode) & 0o222:
        return errno.ENOENT, "is of the system and takes no files"
    return 0, ""


def take_lock(descriptor: int) -> bool:
    """Try to lock an open file without waiting; return whether this process holds the lock now.

    The system releases it when the process ends, also when it is killed. True also on a file system without locks, such
    as some network file systems: there nothing keeps two processes apart.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


@contextmanager
def file_lock(path: Path, patience_seconds: float = LOCK_SECONDS) -> Iterator[bool]:
    """Hold the lock file `path` in the block; yields whether we have it. The file is removed afterwards.

    It waits `patience_seconds` for another holder. The system releases the lock when its process ends, however it ends.
    On a file system without locks it is always granted: there it is up to the user that two processes do not do the
    same work.
    """
    deadline = time.monotonic() + patience_seconds
    while (descriptor := _open_lock(path)) is None:
        if time.monotonic() > deadline:
            yield False
            return
        time.sleep(0.1)
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _open_lock(path: Path) -> int | None:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # its last holder has removed the folder
            return _open_locked(path)


def _open_locked(path: Path) -> int | None:
    """The descriptor of the file `path`, locked, which is created if it is missing. None while another process has it,
    or when that one has just removed or renamed it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    is_ours = False
    try:
        with suppress(FileNotFoundError):
            is_ours = take_lock(descriptor) and os.fstat(descriptor).st_ino == os.stat(path).st_ino
    finally:
        if not is_ours:
            os.close(descriptor)
    return descriptor if is_ours else None
