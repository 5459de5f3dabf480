"""The output folder: what in it is ours, whether it is finished, and starting anew."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import untwin
from untwin.backends.ledger import Ledger
from untwin.errors import OutputExistsError, ParameterError
from untwin.storage.files import Storage, is_remote, join, redact
from untwin.storage.listing import EMBEDDED, Listing
from untwin.storage.lock import LOCK

FORMAT_VERSION = 1
_TEMPORARY = r"_tmp-[0-9a-f]{32}"
_LISTS = KEPT_LIST, REMOVED_LIST, MANIFEST = "kept.txt", "removed.txt", "remove.csv"
"""What `untwin apply` lists in the folder of an answer."""
_OURS = re.compile(
    r"embeddings/part-[0-9a-f]+\.parquet|_embed\.json|_embed/.*|rejected/clips-[0-9a-f]+\.parquet|"
    r"(?:eps=[^/]+/)?(?:"
    rf"run\.json|report\.html|{'|'.join(map(re.escape, _LISTS))}|_lock\.json|groups\.parquet|(?:_work|_audit)/.*|"
    r"_done/(?:.*/)?[^/]+\.json|_plan/(?:plan\.json|listing\.parquet)|"
    r"kmeans/(?:_centroids\.npy|_work/.*|centroid=\d+/part-\d+\.parquet)|"
    r"pairwise/(?:cluster_\d+\.parquet|_rows/unit-\d+\.npy|_work/.*)|"
    r"duplicates/(?:part-\d+\.parquet|_kept\.bits|_work/.*)|"
    r"rejected/(?:invalid|repeated|files)-\d+\.parquet|"
    r"kept/(?:part-\d+(?:_\d+)?\.(?:parquet|jsonl|ndjson)|(?:img_emb|metadata)_\d+\.(?:npy|parquet)|_work/.*)|"
    rf"(?:[^/]+/)*{_TEMPORARY})"
)
_OF_EMBEDDINGS = re.compile(r"embeddings(?:/.*)?|_embed(?:/.*)?|_embed\.json|rejected/clips-.*")
"""What embedding wrote before the run, which goes on from there."""


@dataclass(frozen=True)
class OutputFolder:
    """An output folder of a run, or of an answer beside it."""

    storage: Storage
    path: str

    def file(self, *names: str) -> str:
        """A path below the folder."""
        return join(self.path, *names)

    def rejected_clips(self) -> list[str]:
        """Lists of the clips that gave no vector, as paths below the folder."""
        names = self.storage.names(self.file("rejected"))
        return [f"rejected/{name}" for name in names if name.startswith("clips-")]

    @property
    def plan_path(self) -> str:
        """The plan: written before any work starts."""
        return self.file("_plan", "plan.json")

    @property
    def listing_path(self) -> str:
        """The listing of the input."""
        return self.file("_plan", "listing.parquet")

    @property
    def run_path(self) -> str:
        """`run.json`: written last."""
        return self.file("run.json")

    @property
    def page_path(self) -> str:
        """The report."""
        return self.file("report.html")

    def check_is_folder(self) -> None:
        """Raise OutputExistsError if the path is that of a file, or lies below one."""
        path = self.path
        while not self.storage.exists(path) and not is_remote(path):
            path = posixpath.dirname(path)
        if self.storage.exists(path) and not self.storage.is_folder(path):
            raise OutputExistsError(f"{redact(path)}: is a file; the output must be a folder")

    def read_run(self) -> dict[str, Any] | None:
        """What a finished run wrote about itself; None if there is none."""
        if not self.storage.exists(self.run_path):
            return None
        run: dict[str, Any] = self.storage.read_json(self.run_path)
        if not isinstance(run, dict) or run.get("format_version") != FORMAT_VERSION:
            raise OutputExistsError(f"{redact(self.run_path)}: was not made by this version of untwin; run again")
        return run

    def require_run(self) -> dict[str, Any]:
        """What a finished run wrote about itself; ParameterError if there is none."""
        run = self.read_run()
        if run is None:
            raise ParameterError(f"{redact(self.path)}: holds no finished run (no run.json); untwin run makes one")
        return run

    def write_plan(self, parameters: Mapping[str, Any], described: Mapping[str, Any], **more: Any) -> None:
        """Write what is to be done; from here on the folder holds an unfinished run."""
        plan = {"format_version": FORMAT_VERSION, "untwin": untwin.__version__, "parameters": parameters}
        self.storage.write_json(self.plan_path, {**plan, "input": described, **more})

    def foreign_names(self) -> list[str]:
        """Some of what lies in a folder without a plan, besides what a run leaves that was killed before its plan."""
        names = [name for name in self.storage.names(self.path) if name not in (LOCK, "_plan")]
        if EMBEDDED in names:
            names = [name for name in names if name != "rejected" and not _OF_EMBEDDINGS.fullmatch(name)]
        names += [f"_plan/{name}" for name in self.storage.names(self.file("_plan")) if name != "listing.parquet"]
        return [name for name in names if not re.fullmatch(_TEMPORARY, posixpath.basename(name))]

    def read_same(self, answer: Mapping[str, Any], listing: Listing) -> tuple[Any, Any]:
        """The plan and the `run.json` of a run with the same parameters and input; None for what is not there.

        Raises:
            OutputExistsError: The folder holds something else.
        """
        if not self.storage.exists(self.plan_path):
            names = self.foreign_names()
            if names:
                raise OutputExistsError(
                    f"{redact(self.path)}: holds files that untwin did not make ({', '.join(names[:5])}); "
                    "choose an empty or new folder"
                )
            return None, None
        run = self.read_run()
        plan = self.storage.read_json(self.plan_path)
        known = run or plan
        if known.get("format_version") != FORMAT_VERSION or (run is None and known.get("untwin") != untwin.__version__):
            raise OutputExistsError(
                f"{redact(self.path)}: was made by another version of untwin; choose another folder or give --overwrite"
            )
        before = known["parameters"]
        differing = [
            f"{name} (was {before.get(name)!r}, now {answer.get(name)!r})"
            for name in answer
            if before.get(name) != answer.get(name)
        ]
        if not differing and known["input"]["digest"] != listing.digest():
            changes = listing.difference(Listing.read(self.storage, self.listing_path))
            differing = [f"the input files: {changes}"]
        if differing:
            raise OutputExistsError(
                f"{redact(self.path)}: holds a run that differs in {'; '.join(differing)}; choose another folder, "
                "or give --overwrite to remove that run and start anew"
            )
        return plan, run

    def known_listing(self, answer: Mapping[str, Any]) -> Listing | None:
        """The listing of a run with these parameters that is here, finished or not."""
        if not self.storage.exists(self.plan_path):
            return None
        same = self.storage.read_json(self.plan_path).get("parameters") == answer
        return Listing.read(self.storage, self.listing_path) if same else None

    def resume(self, *, known: bool) -> Ledger:
        """What is done of a run here; files of ours that no finished unit lists are removed.

        Args:
            known: There is an unfinished run to go on with; else nothing here counts.
        """
        ledger = Ledger(self.storage, self.path)
        if known:
            ledger.load()
        else:
            ledger.forget()
        listed = ledger.files()
        mirrored = self._mirrored()
        for file in self.storage.find(self.path) if self.storage.is_folder(self.path) else []:
            relative = file.path[len(self.path) :].strip("/")
            if relative.startswith("eps=") or relative in listed or relative in (LOCK, *_LISTS):
                continue
            if _OF_EMBEDDINGS.fullmatch(relative):
                continue
            temporary = re.fullmatch(_TEMPORARY, posixpath.basename(relative))
            markers = relative.startswith(("_plan/", "_done/"))
            if temporary or (not markers and self._is_ours(relative, mirrored)):
                self.storage.remove(file.path)
        self.abort_uploads()
        return ledger

    def remove_temporaries(self) -> None:
        """Remove files that were never completed. Only while the folder is locked, and once all units are done."""
        if not is_remote(self.path):
            for file in self.storage.find(self.path):
                name = file.path[len(self.path) :].strip("/")
                if not name.startswith("eps=") and re.fullmatch(_TEMPORARY, posixpath.basename(name)):
                    self.storage.remove(file.path)

    def abort_uploads(self, *, answers: bool = False) -> None:
        """Abort uploads of our own that were never completed. Only while the folder is locked.

        Args:
            answers: Also those of other answers below the folder, which have a lock of their own.
        """
        if is_remote(self.path):
            mirrored = self._mirrored()
            self.storage.abort_uploads(
                self.path, lambda name: (answers or not name.startswith("eps=")) and self._is_ours(name, mirrored)
            )

    def clear(self) -> None:
        """Remove an earlier run: exactly the files that untwin makes. Embeddings of clips stay.

        Raises:
            OutputExistsError: There is a file that untwin did not make; nothing is removed then.
        """
        self.check_clearable()
        if not self.storage.exists(self.plan_path):
            return
        self.abort_uploads(answers=True)
        # what says that there is a result goes first, and what says that it is ours goes last
        names = self.storage.names(self.path)
        first = [name for name in ("run.json", "_done") if name in names]
        kept = "rejected" if EMBEDDED in names else ""
        for name in (*first, *(name for name in names if name not in (*first, "_plan", LOCK, kept))):
            if not _OF_EMBEDDINGS.fullmatch(name):
                self.storage.remove(self.file(name))
        for name in self.storage.names(self.file(kept)) if kept in names else []:
            if not _OF_EMBEDDINGS.fullmatch(f"{kept}/{name}"):
                self.storage.remove(self.file(kept, name))
        self.storage.remove(self.plan_path)
        self.storage.remove(self.file("_plan"))

    def check_clearable(self) -> None:
        """Raise OutputExistsError if there is a file that untwin did not make."""
        if not self.storage.exists(self.plan_path):
            if self.foreign_names():
                raise OutputExistsError(
                    f"{redact(self.path)}: holds no run of untwin; --overwrite removes nothing else; "
                    "choose another folder"
                )
            return
        mirrored = self._mirrored()
        files = [file.path for file in self.storage.find(self.path)]
        foreign = [path for path in files if not self._is_ours(path[len(self.path) :].strip("/"), mirrored)]
        if foreign:
            raise OutputExistsError(
                f"{redact(self.path)}: holds files that untwin did not make ({', '.join(map(redact, foreign[:5]))}); "
                "move them away before --overwrite"
            )

    def _mirrored(self) -> set[str]:
        """The names, without ending, that files of `kept/` can have after files of the input."""
        mirrored: set[str] = set()
        if self.storage.exists(self.listing_path):
            relative = Listing.read(self.storage, self.listing_path).files["relative"].to_pylist()
            for name in relative:
                stem = posixpath.splitext(name)[0]
                mirrored.add(stem)
                if name.endswith(".npy"):
                    folder, number = posixpath.dirname(stem), stem.rpartition("_")[2]
                    mirrored |= {posixpath.join(folder, f"{kind}_{number}") for kind in ("img_emb", "metadata")}
        return mirrored

    @staticmethod
    def _is_ours(relative: str, mirrored: set[str]) -> bool:
        if _OURS.fullmatch(relative):
            return True
        match = re.fullmatch(r"(?:eps=[^/]+/)?kept/(.*)", relative, re.DOTALL)
        if not match:
            return False
        stem = posixpath.splitext(match.group(1))[0]
        return stem in mirrored or re.sub(r"_\d+$", "", stem) in mirrored
