"""One writer per folder, of a dataset or of a run: a lock that ends with its process, however that ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.errors import UserError

LOCK_NAME = ".lock"
_held: set[int] = set()  # descriptors of this process's locks


@contextmanager
def folder_lock(folder: Path, work: str, elsewhere: str) -> Iterator[None]:
    """Hold the folder's lock. The kernel frees it when the process dies, so a dead process never blocks the next.

    Args:
        work: what the holder does, for the message: "is preparing it".
        elsewhere: how to name another folder, for the message: "OUT=...".
    Raises:
        UserError: another process works in this folder, or nothing can be written there.
    """
    path = folder / LOCK_NAME
    created = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(path)
    except BlockingIOError as error:
        holder = _holder(path)
        raise UserError(
            f"{folder}: process {holder} {work}. Wait for it, stop it (kill {holder}), or give another folder with "
            f"{elsewhere}."
        ) from error
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}). Give another folder with {elsewhere}."
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        _held.discard(descriptor)
        os.close(descriptor)
        for each in created:  # leave no empty folder behind
            if not each.is_dir() or any(each.iterdir()):
                break
            each.rmdir()


def let_go_of_inherited_locks() -> None:
    """In a forked process that writes nothing: its parent's locks end with its parent, not with it."""
    while _held:
        os.close(_held.pop())


def _lock(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
                _held.add(descriptor)
                return descriptor
            os.close(descriptor)  # its holder removed the file between our two calls: lock the new one
        except OSError:
            os.close(descriptor)
            raise


def _holder(path: Path) -> str:
    try:
        return path.read_text() or "another"
    except OSError:
        return "another"
