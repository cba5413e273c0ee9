"""What a power cut leaves behind: what was fsynced, and by luck some of the rest.

While a trial runs, its processes write down each fsync of Python's: of a file its number, size and time,
of a folder its names. At the cut everything else in the state is at the mercy of the dice: a file may be
empty, half or whole, a name may be there or not, as POSIX allows it. The files of DuckDB and SQLite, which
sync themselves in C, are left as a kill leaves them.
"""

import json
import os
import random
import stat
from pathlib import Path
from typing import Any

_OWN_SYNC = (".duckdb", ".wal", ".db", ".db-journal", ".lock", ".sock")


def record(home: Path) -> None:
    """From now on this process writes down what it syncs."""
    real = os.fsync
    log = home / "synced"

    def fsync(descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        real(number)
        with log.open("a") as file:
            file.write(json.dumps(_describe(number)) + "\n")

    os.fsync = fsync


def _describe(number: int) -> dict[str, Any]:
    told = os.fstat(number)
    if stat.S_ISDIR(told.st_mode):
        with os.scandir(number) as entries:
            return {"folder": told.st_ino, "names": {e.name: e.inode() for e in entries}}
    return {"file": told.st_ino, "size": told.st_size, "time": told.st_mtime_ns}


def everything(state: Path, log: Path) -> None:
    """Writes down the whole state as synced, as it is on a machine that was idle for a minute."""
    with log.open("w") as file:
        for folder, _, names in os.walk(state):
            for path in (folder, *(os.path.join(folder, name) for name in names)):
                if stat.S_ISSOCK(os.stat(path).st_mode):
                    continue
                number = os.open(path, os.O_RDONLY)
                file.write(json.dumps(_describe(number)) + "\n")
                os.close(number)


def cut(state: Path, log: Path, dice: random.Random) -> list[str]:
    """Takes from the state what was not synced; says what."""
    files: dict[int, tuple[int, int]] = {}
    folders: dict[int, dict[str, int]] = {}
    for line in log.read_text().splitlines():
        told = json.loads(line)
        if "folder" in told:
            folders[told["folder"]] = told["names"]
        else:
            files[told["file"]] = (told["size"], told["time"])
    return [*_lose_contents(state, files, dice), *_lose_names(state, folders, dice)]


def _lose_contents(state: Path, files: dict[int, tuple[int, int]], dice: random.Random) -> list[str]:
    lost = []
    for path in sorted(p for p in state.rglob("*") if p.is_file() and not p.name.endswith(_OWN_SYNC)):
        told = path.stat()
        if files.get(told.st_ino) != (told.st_size, told.st_mtime_ns):
            left = dice.choice((0, told.st_size // 2, told.st_size))
            if left < told.st_size:
                os.truncate(path, left)
                lost.append(f"{path.relative_to(state)} keeps {left} of {told.st_size} bytes")
    return lost


def _lose_names(state: Path, folders: dict[int, dict[str, int]], dice: random.Random) -> list[str]:
    """New names in a folder that was not synced since; a rename is undone, where its old name is known."""
    import shutil

    lost = []
    places = [state, *sorted((p for p in state.rglob("*") if p.is_dir()), reverse=True)]
    for folder in places:
        if not folder.exists():
            continue
        synced = folders.get(folder.stat().st_ino, {})
        old_names = {number: name for name, number in synced.items()}
        for path in sorted(folder.iterdir()):
            number = path.stat().st_ino
            if synced.get(path.name) == number or path.name.endswith(_OWN_SYNC) or dice.random() < 0.5:
                continue
            lost.append(f"{path.relative_to(state)} was never there")
            before = old_names.get(number)
            if before is not None and not (folder / before).exists():
                path.rename(folder / before)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    return lost
