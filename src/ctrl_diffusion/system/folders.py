"""Check, lock and clear the folders that jobs write into."""

import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"


def check_output(folder: Path, marker: str, overwrite: bool) -> None:
    """Refuse a folder that cannot be written, or holds files; `overwrite` allows files of a job with this marker."""
    if folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()):
        if not overwrite:
            raise ValueError(f"{folder} exists and is not empty. Choose another --out, or pass --overwrite.")
        if not (folder / marker).is_file():
            raise ValueError(f"{folder} holds files but no {marker} of ours to overwrite. Choose another --out.")
    check_writable(folder)


def check_writable(folder: Path) -> None:
    """Refuse a folder that can neither be written nor made."""
    above = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not above.is_dir():
        raise ValueError(f"{above} is a file. Choose another --out.")
    if not os.access(above, os.W_OK):
        raise ValueError(f"{above} cannot be written to. Choose another --out.")


def check_file(path: Path) -> None:
    """Refuse a file that cannot be written."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder. Name a file with --out.")
    check_writable(path.absolute().parent)


def clear(folder: Path, patterns: Iterable[str]) -> None:
    """Remove the files and folders that match, in the order of the patterns, and make the folder if need be."""
    for path in [path for pattern in patterns for path in sorted(folder.glob(pattern))]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    folder.mkdir(parents=True, exist_ok=True)


def clear_unfinished(folder: Path) -> None:
    """Remove temporary files that a killed process left."""
    for path in filter(Path.is_file, folder.rglob(".*.part*")):
        path.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other jobs out of a folder, which is made if need be and removed if it is empty at the end.

    The operating system releases the lock when the process ends, however it ends. ValueError if another job holds it.
    """
    made = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    lock = FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"{holder(path)} is writing {folder}. Wait for it, or choose another --out.") from None
    except OSError as error:
        warnings.warn(f"{folder} cannot be locked ({error}): see that no other job writes it.", stacklevel=3)
    with suppress(OSError):  # Windows lets nobody write what is locked
        path.write_text(f"{os.getpid()}\n", encoding="utf-8")  # for the error above, of other jobs
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file: there the release does
            path.unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # they are not empty
            for empty in made:
                empty.rmdir()


def holder(path: Path) -> str:
    """Name the job that holds a lock, by its process where the file can be read."""
    with suppress(OSError):
        if number := path.read_text(encoding="utf-8").strip():
            return f"another job (process {number})"
    return "another job"
