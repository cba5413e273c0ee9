"""What a power cut leaves behind: what was fsynced, and by luck some of the rest.

While a trial runs, its processes write down each fsync of Python's: of a file its number, size and time,
of a folder its names. At the cut everything else in the state is at the mercy of the dice: a file may be
empty, half or whole, a name may be there or not, and what was removed or replaced since its folder was
synced may be back, as POSIX allows it. The files of DuckDB and SQLite, which sync themselves in C, are left
as a kill leaves them.
"""

import json
import os
import random
import shutil
import stat
from collections import Counter
from pathlib import Path
from typing import Any

_OWN_SYNC = (".duckdb", ".wal", ".db", ".db-journal", ".lock", ".sock")
# A file or folder: its number, and how many folders had that number before. The system uses numbers again.
Inode = tuple[int, int]


def record(home: Path) -> None:
    """From now on this process writes down what it syncs, and which folders it removes."""
    real_fsync, real_rmdir = os.fsync, os.rmdir
    log = home / "synced"

    def fsync(descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        real_fsync(number)
        _write(log, _describe(number, log))

    def rmdir(path: Any, *, dir_fd: int | None = None) -> None:
        number = os.stat(path, dir_fd=dir_fd, follow_symlinks=False).st_ino
        real_rmdir(path, dir_fd=dir_fd)
        _write(log, {"gone": number})

    os.fsync, os.rmdir = fsync, rmdir


def _write(log: Path, told: dict[str, Any]) -> None:
    with log.open("a") as file:
        file.write(json.dumps(told) + "\n")


def _describe(number: int, log: Path) -> dict[str, Any]:
    told = os.fstat(number)
    if stat.S_ISDIR(told.st_mode):
        with os.scandir(number) as entries:
            found = list(entries)
        for entry in found:
            _keep(entry, number, log)
        return {"folder": told.st_ino, "names": {e.name: e.inode() for e in found}}
    return {"file": told.st_ino, "size": told.st_size, "time": told.st_mtime_ns}


def _keep(entry: "os.DirEntry[str]", folder: int, log: Path) -> None:
    """A second name for a file, so that it can be given back should its own be removed."""
    second = _kept(log) / str(entry.inode())
    if entry.is_file(follow_symlinks=False) and not entry.name.endswith(_OWN_SYNC) and not second.exists():
        try:
            os.link(entry.name, second, src_dir_fd=folder)
        except FileNotFoundError:  # the other process has removed it meanwhile
            return


def _kept(log: Path) -> Path:
    return log.with_name("inodes")


def everything(state: Path, log: Path) -> None:
    """Writes down the whole state as synced, as it is on a machine that was idle for a minute."""
    shutil.rmtree(_kept(log), ignore_errors=True)
    _kept(log).mkdir()
    log.write_text("")
    for folder, _, names in os.walk(state):
        for path in (folder, *(os.path.join(folder, name) for name in names)):
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                number = os.open(path, os.O_RDONLY)
                _write(log, _describe(number, log))
                os.close(number)


def cut(state: Path, log: Path, dice: random.Random) -> list[str]:
    """Takes from the state what was not synced, gives back what was removed without; says what."""
    cutting = _Cut(state, log, dice)
    cutting.lose_contents()
    cutting.lose_names()
    return cutting.told


class _Cut:
    """What was synced, by the log, and what the dice make of all else."""

    def __init__(self, state: Path, log: Path, dice: random.Random) -> None:
        self.state, self.dice, self.kept = state, dice, _kept(log)
        self.told: list[str] = []
        self.files: dict[int, tuple[int, int]] = {}
        self.folders: dict[Inode, dict[str, Inode]] = {}
        self.gone: Counter[int] = Counter()  # folders that had this number
        for line in log.read_text().splitlines():
            told = json.loads(line)
            if "folder" in told:
                names = {name: self._inode(number) for name, number in told["names"].items()}
                self.folders[self._inode(told["folder"])] = names
            elif "gone" in told:
                self.gone[told["gone"]] += 1
            else:
                self.files[told["file"]] = (told["size"], told["time"])

    def _inode(self, number: int) -> Inode:
        return number, self.gone[number]

    def lose_contents(self) -> None:
        for path in sorted(
            p for p in self.state.rglob("*") if p.is_file() and not p.name.endswith(_OWN_SYNC)
        ):
            told = path.stat()
            if self.files.get(told.st_ino) != (told.st_size, told.st_mtime_ns):
                left = self.dice.choice((0, told.st_size // 2, told.st_size))
                if left < told.st_size:
                    os.truncate(path, left)
                    self.told.append(f"{path.relative_to(self.state)} keeps {left} of {told.st_size} bytes")

    def lose_names(self) -> None:
        """Of folders that were not synced since: a new name goes, and with it a rename is undone; a removed
        one is back."""
        folders = [self.state, *sorted((p for p in self.state.rglob("*") if p.is_dir()), reverse=True)]
        named = {self._inode(path.stat().st_ino) for path in (self.state, *self.state.rglob("*"))}
        for folder in folders:
            if not folder.exists():
                continue
            synced = self.folders.get(self._inode(folder.stat().st_ino), {})
            old_names = {inode: name for name, inode in synced.items()}
            for path in sorted(folder.iterdir()):
                inode = self._inode(path.stat().st_ino)
                if synced.get(path.name) == inode or path.name.endswith(_OWN_SYNC) or self._lucky():
                    continue
                self.told.append(f"{path.relative_to(self.state)} was never there")
                self._lose(path, old_names.get(inode))
                if (
                    path.name in synced and not path.exists()
                ):  # it had replaced another: one of the two is there
                    self._give_back(path, synced[path.name])
            for name, inode in sorted(synced.items()):
                if inode not in named and not (folder / name).exists() and not self._lucky():
                    self._give_back(folder / name, inode)

    def _lucky(self) -> bool:
        return self.dice.random() < 0.5

    def _lose(self, path: Path, before: str | None) -> None:
        if before is not None and not path.with_name(before).exists():
            path.rename(path.with_name(before))
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    def _give_back(self, path: Path, inode: Inode) -> None:
        second = self.kept / str(inode[0])
        if inode in self.folders:
            path.mkdir()
            for name, its in sorted(self.folders[inode].items()):
                if not self._lucky():
                    self._give_back(path / name, its)
        elif second.exists() and not path.name.endswith(_OWN_SYNC):
            os.link(second, path)
        else:
            return
        self.told.append(f"{path.relative_to(self.state)} is back")
