"""Directories that are complete or not there: write aside, fsync, manifest last, rename.

Knows files only; free of torch, DuckDB and MLflow, so that every package may import it. A directory
is complete when it has `manifest.json`, which names every other file below with its SHA-256.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from storage.errors import UNREADABLE, IntegrityError

MANIFEST = "manifest.json"
_NEXT = "move the directory aside and run `daemon doctor`"


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: str | Path, data: str | bytes) -> None:
    """Replace a file as a whole: readers, and a crash, see the old one or the new one."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.tmp")
    with open(aside, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    fsync(path.parent)


def write_manifest(directory: str | Path, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Hash and fsync every file below, then write `manifest.json`; what it returns is in it.

    `extra` holds further entries of the manifest, beside `files`.
    """
    root = Path(directory)
    sync(root)
    files = _files(root)
    manifest = {**(extra or {}), "files": {name: sha256_file(path) for name, path in files.items()}}
    write_file(root / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    return manifest


def sync(directory: str | Path, *, names_upto: Path | None = None) -> None:
    """Every file and folder below, so that a power cut keeps them; and the names of the directory and its
    parents, up to those in `names_upto`."""
    for folder, _, names in os.walk(directory):
        for name in names:
            fsync(Path(folder, name))
        fsync(Path(folder))
    for parent in Path(directory).parents if names_upto else ():
        fsync(parent)
        if parent == names_upto:
            break


def make_folder(path: str | Path) -> Path:
    """The folder and its parents. What is synced in it later is only found if its own name was, too."""
    path = Path(path)
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync(folder.parent)
    return path


def is_complete(directory: str | Path) -> bool:
    """Whether the directory was written to its end (not whether it was changed since: `verify`)."""
    return (Path(directory) / MANIFEST).is_file()


def made_for(directory: str | Path, job: str) -> bool:
    """Whether the directory is complete and was made for this job, by the digest in its manifest.

    A path alone does not say so: after a restore the same cycle number may stand for other work.
    """
    return is_complete(directory) and _read_manifest(Path(directory)).get("job") == job


def verify(directory: str | Path) -> dict[str, Any]:
    """The manifest, after every file was compared with it.

    Raises `IntegrityError` that names the first file that is missing, changed or not in the manifest.
    """
    root = Path(directory)
    manifest = _read_manifest(root)
    listed, found = manifest["files"], _files(root)
    for name in sorted(listed.keys() | found.keys()):
        if name not in found:
            raise IntegrityError(f"{root / name} is missing; {_NEXT}")
        if name not in listed:
            raise IntegrityError(f"{root / name} does not belong there: {MANIFEST} does not list it; {_NEXT}")
        if sha256_file(found[name]) != listed[name]:
            raise IntegrityError(f"{root / name} was changed after it was written; {_NEXT}")
    return manifest


@contextmanager
def atomic_dir(final: str | Path, extra: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """A directory to fill, which becomes `final` with its manifest when the block ends well.

    On an error nothing of it remains, and an earlier `final` stays. After a good end that one is replaced:
    check `is_complete` first where it should stay. `extra` is read at the end: the block may still add to it.
    """
    final = Path(final)
    make_folder(final.parent)
    aside, old = final.with_name(f".{final.name}.tmp"), final.with_name(f".{final.name}.old")
    for leftover in (aside, old):
        remove(leftover)
    aside.mkdir()
    try:
        yield aside
        write_manifest(aside, extra)
        if final.exists():
            final.rename(old)
        aside.rename(final)
    except BaseException:
        if old.exists() and not final.exists():
            old.rename(final)
        remove(aside)
        raise
    fsync(final.parent)
    remove(old)


def remove(directory: Path) -> None:
    """A folder, if it is there, and all that is in it, so that a power cut does not bring it back. Raises
    `OSError` that names the whole path, which `rmtree` does not; of a link, what it leads to is not ours."""
    try:
        if directory.is_symlink():
            raise OSError(errno.ELOOP, f"it is a link to {directory.readlink()}; remove both by hand")
        if directory.exists():
            shutil.rmtree(directory)
            fsync(directory.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(directory)) from None


def _read_manifest(root: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IntegrityError(f"{root} is not complete: it has no {MANIFEST}; {_NEXT}") from None
    except UNREADABLE as error:
        raise IntegrityError(f"{root / MANIFEST} is damaged ({error}); {_NEXT}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise IntegrityError(f"{root / MANIFEST} is damaged (it lists no files); {_NEXT}")
    return manifest


def _files(root: Path) -> dict[str, Path]:
    """Every file below, by its name relative to the root, except the root's manifest."""
    paths = sorted(path for path in root.rglob("*") if not path.is_dir())
    return {path.relative_to(root).as_posix(): path for path in paths if path != root / MANIFEST}


def fsync(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
