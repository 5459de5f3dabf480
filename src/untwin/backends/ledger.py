"""What is done of a run: a marker for each unit, so that a run that was killed goes on where it stopped.

`_done/CHAIN/UNIT.json` says what came out of a unit and which files it wrote, with their sizes and checksums. Once
all units of a chain are done, `_done/CHAIN.json` takes the place of its markers: the list of what a reader may read.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from untwin.errors import DamagedFileError
from untwin.stages import tasks
from untwin.stages.base import Task, where_data_is
from untwin.storage.files import Storage, WrittenFile, join, redact
from untwin.storage.spread import in_parts

_KINDS = {name: kind for name, kind in vars(tasks).items() if isinstance(kind, type) and dataclasses.is_dataclass(kind)}
_READERS = 16
_log = logging.getLogger("untwin")
T = TypeVar("T", bound=Task)


@dataclasses.dataclass(frozen=True)
class Done:
    """A finished chain: the tasks that came out of each of its stages, in unit order, and the rows it went over."""

    tasks: tuple[tuple[Task, ...], ...]
    n_rows: int


class Ledger:
    """The markers of an output folder. Paths below the folder are written relative to it, so that it can be moved.

    Args:
        storage: Access to the folder.
        root: The output folder.
    """

    def __init__(self, storage: Storage, root: str) -> None:
        self._storage = storage
        self._root = root
        self._folder = join(root, "_done")
        self._chains: dict[str, dict[str, Any]] = {}
        self._units: dict[tuple[str, int], dict[str, Any]] = {}

    def load(self, *, check: bool = True) -> None:
        """Read all markers.

        Args:
            check: Look whether the files are as they were written. A unit whose files are not is forgotten; so is
                everything, if it belongs to a finished chain: what it was made from may be gone.
        """
        names = self._storage.names(self._folder)
        chains = [name.removesuffix(".json") for name in names if name.endswith(".json")]
        units = [
            (name, unit)
            for name in names
            if not name.endswith(".json") and name not in chains
            for unit in self._storage.names(join(self._folder, name))
            if unit.endswith(".json")
        ]
        with ThreadPoolExecutor(_READERS) as pool:
            paths = [join(self._folder, f"{name}.json") for name in chains]
            self._chains = _known(zip(chains, pool.map(self._read, paths), strict=True))
            read = pool.map(lambda place: self._read(join(self._folder, *place)), units)
            keys = [(name, int(unit.removesuffix(".json"))) for name, unit in units]
            self._units = _known(zip(keys, read, strict=True))
        if not check:
            return
        for name in set(names).intersection(self._chains):  # a kill came before these were removed
            self._storage.remove(join(self._folder, name))
        removed = tuple(path + "/" for chain in self._chains.values() for path in chain["removed"])
        wanted = [file for chain in self._chains.values() for file in chain["files"] if not file[0].startswith(removed)]
        written = [
            WrittenFile(join(self._root, path), size, checksum)
            for path, size, checksum in (*wanted, *(file for unit in self._units.values() for file in unit["files"]))
        ]
        # by those who may read vectors: these are among the files
        damaged = where_data_is(_damaged, self._storage, written) if written else set()
        lost = [file.path for file in written[: len(wanted)] if file.path in damaged]
        if lost or len(self._chains) < len(chains):
            _log.warning("%s: is gone or damaged; the work starts anew", redact(lost[0] if lost else self._folder))
            self.forget()
            return
        for key, marker in list(self._units.items()):
            if any(join(self._root, file[0]) in damaged for file in marker["files"]):
                del self._units[key]

    def _read(self, path: str) -> dict[str, Any] | None:
        try:
            content = self._storage.read_json(path)
        except DamagedFileError:
            return None
        return content if isinstance(content, dict) else None

    def forget(self) -> None:
        """Remove all markers."""
        self._storage.remove(self._folder)
        self._chains, self._units = {}, {}

    def files(self) -> set[str]:
        """The files that the markers list, relative to the folder."""
        markers = (*self._chains.values(), *self._units.values())
        return {file[0] for marker in markers for file in marker["files"]}

    def finished(self, chain: str) -> Done | None:
        """What came out of a chain, if all its units are done."""
        known = self._chains.get(chain)
        if known is None:
            return None
        results = tuple(tuple(self._decode(task) for task in stage) for stage in known["tasks"])
        return Done(results, known["rows"])

    def tasks_of(self, kind: type[T]) -> list[T]:
        """The tasks of a kind that finished chains gave."""
        found = (task for chain in self._chains for stage in self._done(chain).tasks for task in stage)
        return [task for task in found if isinstance(task, kind)]

    def _done(self, chain: str) -> Done:
        known = self.finished(chain)
        assert known is not None
        return known

    def reuse(self, chain: str, unit: Task) -> tuple[Task, ...] | None:
        """What came out of each stage of a chain for a unit, if it is done."""
        known = self._units.get((chain, unit.unit))
        if known is None or known["unit"] != json.loads(json.dumps(self._encode(unit))):
            return None
        return tuple(self._decode(task) for task in known["tasks"])

    def record(self, chain: str, unit: Task, results: Sequence[Task], files: Sequence[WrittenFile]) -> None:
        """Note that a unit is done."""
        marker = {
            "unit": self._encode(unit),
            "tasks": [self._encode(task) for task in results],
            "files": [self._listed(file) for file in files],
        }
        self._write(join(self._folder, chain, f"{unit.unit}.json"), marker)
        self._units[chain, unit.unit] = json.loads(json.dumps(marker))

    def finish(
        self,
        chain: str,
        results: Sequence[Sequence[Task]],
        n_rows: int,
        removed: Sequence[str] = (),
        files: Sequence[WrittenFile] = (),
    ) -> None:
        """Note that all units of a chain are done.

        Args:
            chain: Its name.
            results: The tasks of each stage, in unit order.
            n_rows: Rows it went over.
            removed: Folders that are removed next, so that nobody looks for them.
            files: What units have written of which there is no marker.
        """
        mine = {key: marker for key, marker in self._units.items() if key[0] == chain}
        record = {
            "tasks": [[self._encode(task) for task in stage] for stage in results],
            "rows": n_rows,
            "files": [file for marker in mine.values() for file in marker["files"]] + [*map(self._listed, files)],
            "removed": [self._relative(path) for path in removed],
        }
        self._write(join(self._folder, f"{chain}.json"), record)
        self._chains[chain] = record
        for key in mine:
            del self._units[key]
        self._storage.remove(join(self._folder, chain))

    def _write(self, path: str, marker: Mapping[str, Any]) -> None:
        text = json.dumps(marker, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        self._storage.write_bytes(path, text.encode(), durable=True)

    def _listed(self, file: WrittenFile) -> list[Any]:
        return [self._relative(file.path), file.size, file.checksum]

    def _relative(self, path: str) -> str:
        return path.removeprefix(self._root).lstrip("/")

    def _encode(self, value: Any) -> Any:
        """JSON of a task: dataclasses by name, mappings as pairs, paths below the folder relative to it."""
        if dataclasses.is_dataclass(value):
            fields = {field.name: self._encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return {"kind": type(value).__name__, "fields": fields}
        if isinstance(value, Mapping):
            return {"pairs": [[self._encode(key), self._encode(item)] for key, item in value.items()]}
        if isinstance(value, tuple):
            return [self._encode(item) for item in value]
        if isinstance(value, str):
            below = value.startswith(self._root.rstrip("/") + "/")
            # text of other origin cannot be taken for a path: it gets another first character
            return "/" + self._relative(value) if below else "=" + value
        return value

    def _decode(self, value: Any) -> Any:
        if isinstance(value, dict):
            if "pairs" in value:
                return {self._decode(key): self._decode(item) for key, item in value["pairs"]}
            fields = {name: self._decode(item) for name, item in value["fields"].items()}
            return _KINDS[value["kind"]](**fields)
        if isinstance(value, list):
            return tuple(self._decode(item) for item in value)
        if isinstance(value, str):
            return join(self._root, value[1:]) if value.startswith("/") else value[1:]
        return value


def _damaged(storage: Storage, files: Sequence[WrittenFile]) -> set[str]:
    """The paths of the files that are not there as they were written."""
    return {path for part in in_parts(functools.partial(_damaged_part, storage), files) for path in part}


def _damaged_part(storage: Storage, files: Sequence[WrittenFile]) -> list[str]:
    with ThreadPoolExecutor(_READERS) as pool:
        return [file.path for file, good in zip(files, pool.map(storage.is_unchanged, files), strict=True) if not good]


def _known(read: Iterator[tuple[Any, dict[str, Any] | None]]) -> dict[Any, dict[str, Any]]:
    return {key: marker for key, marker in read if marker is not None}
