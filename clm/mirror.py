"""`python -m clm mirror`: a copy of a run's folder in a place that outlives the machine, such as a bucket.

In: a run's folder, and a folder, s3://..., gs://... or any other place that fsspec knows. Out: there, the run's records
(recipe.yaml, metrics.jsonl ...), its complete checkpoints and models, and `mirror.json`, which lists what is whole:

    there/checkpoint-200/...   uploaded whole, then listed          mirror.json  {"folders": {"checkpoint-200": {...}}}

A folder that is not listed does not exist for `restore`, so an upload that was cut off does no harm. Of a bucket
nothing else is expected than that a small file is replaced as a whole: no rename, no lock, no append.
"""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from clm.run_folder import MANIFEST, PREFIX, WEIGHTS_MANIFEST, list_checkpoints, list_weights
from data_prep.errors import UserError
from data_prep.sizes import format_bytes

LISTING = "mirror.json"
FINAL, AVERAGE = "final", "final-ema"  # the second with run.ema; it is there before the first
_LOOK_SECONDS = 0.2  # between two looks at whether the end was asked for
_NOT_COPIED = ("STOP", "SAVE")  # requests to a living run


class Mirror:
    """A run's folder and its place elsewhere.

    Raises:
        UserError: the place is of a kind that needs a package which is not installed, or its listing is damaged.
    """

    def __init__(self, run: Path, place: str):
        self.run, self.place = run, place.rstrip("/")
        try:
            self.system, self.root = fsspec.core.url_to_fs(self.place)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"{place}: cannot be used ({error}). s3:// needs `pip install s3fs`, gs:// gcsfs, az:// adlfs."
            ) from error
        self.listing = self._read_listing()

    def restore(self) -> list[str]:
        """Bring here what is there, unless this disk has as new a checkpoint; the names of the folders."""
        here = self._complete()
        if _newest(here) >= _newest(self.listing["folders"]):
            return []
        brought = [name for name in self.listing["folders"] if name not in here]
        for name in sorted(brought, key=_step_of):  # the newest last: it is what says that this disk is up to date
            temporary = self.run / f".restoring-{name}"
            for file in self.listing["folders"][name]["files"]:
                self._download(f"{name}/{file}", temporary / file)
            temporary.rename(self.run / name)
            _say(f"{name} is back from {self.place}")
        for file in self.listing["records"]:
            self._download(file, self.run / file)
        return brought

    def update(self) -> None:
        """Copy what is new here, remove there what this mirror copied and the run has since removed.

        Raises:
            Exception: the place cannot be reached; what is listed there is still whole.
        """
        folders = self._complete()  # before the records, which then reach at least as far as these checkpoints
        records = {
            path.name: [path.stat().st_size, path.stat().st_mtime_ns]
            for path in self.run.iterdir()
            if path.is_file() and not path.name.startswith(".") and path.name not in _NOT_COPIED
        }
        for name, state in records.items():
            if self.listing["records"].get(name) != state:
                self._upload(self.run / name, name)
                self.listing["records"][name] = state
        for name, folder in folders.items():
            try:
                self._copy_folder(name, folder)
            except FileNotFoundError:
                continue  # the run removed it meanwhile
        gone = [name for name in self.listing["folders"] if name not in folders]
        for name in gone:
            del self.listing["folders"][name]
        self._write_listing()
        for name in gone:
            self.system.rm(f"{self.root}/{name}", recursive=True)

    def _copy_folder(self, name: str, folder: Path) -> None:
        found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        files = {file: path.stat().st_size for file, path in found.items()}
        manifest = found.get(MANIFEST) or found.get(WEIGHTS_MANIFEST)
        content = manifest.read_bytes() if manifest else json.dumps(files).encode()
        entry = {"sha256": hashlib.sha256(content).hexdigest(), "files": files}
        if self.listing["folders"].get(name) == entry:
            return
        if self.listing["folders"].pop(name, None):  # of a time before a rollback
            self._write_listing()
        for file, path in found.items():
            self._upload(path, f"{name}/{file}")
        self.listing["folders"][name] = entry
        self._write_listing()
        _say(f"{name} ({format_bytes(sum(files.values()))}) is in {self.place}")

    def _complete(self) -> dict[str, Path]:
        """The complete folders of the run, by name."""
        found = [path for _, path in (*list_weights(self.run), *list_checkpoints(self.run))]
        return {path.name: path for path in (*found, self.run / AVERAGE, self.run / FINAL) if path.is_dir()}

    def _upload(self, path: Path, name: str) -> None:
        target = f"{self.root}/{name}"
        self._make_folder(str(PurePosixPath(target).parent))
        self.system.put_file(str(path), target)

    def _make_folder(self, path: str) -> None:
        if isinstance(self.system, LocalFileSystem):  # a bucket has none, and s3fs would make the bucket itself
            self.system.makedirs(path, exist_ok=True)

    def _download(self, name: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.system.get_file(f"{self.root}/{name}", str(path))

    def _read_listing(self) -> dict[str, dict[str, Any]]:
        path = f"{self.root}/{LISTING}"
        try:
            return json.loads(self.system.cat_file(path))
        except FileNotFoundError:
            return {"folders": {}, "records": {}}
        except Exception as error:  # botocore's and others' errors have nothing in common
            raise UserError(f"{self.place}/{LISTING}: cannot be read ({type(error).__name__}: {error}).") from error

    def _write_listing(self) -> None:
        self._make_folder(self.root)
        self.system.pipe_file(f"{self.root}/{LISTING}", json.dumps(self.listing, indent=1).encode())


def restore_run(run: Path, place: str) -> None:
    """The command with --restore: what is there comes here, or it is said why not."""
    run.mkdir(parents=True, exist_ok=True)
    mirror = Mirror(run, place)
    try:
        if not mirror.restore():
            _say(f"{run} has all that is in {place}" if mirror.listing["folders"] else f"{place} holds nothing yet")
    except Exception as error:  # as above
        raise UserError(f"{place}: cannot be read ({error}). The same command tries again.") from error


def mirror_run(run: Path, place: str, every: float, is_once: bool) -> None:
    """The command: copy every so many seconds, until final/ is there or SIGTERM comes; then once more.

    Raises:
        UserError: with `is_once`, or at the end, the place could not be reached.
    """
    run.mkdir(parents=True, exist_ok=True)
    mirror, asked = Mirror(run, place), []  # a list: Event.set in a handler waits for ever if it interrupts wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: asked.append(number))
    while True:
        is_last = is_once or bool(asked) or (run / FINAL).exists()
        began_at = time.monotonic()
        try:
            mirror.update()
        except Exception as error:  # as above; the run goes on, and the next copy may arrive
            if is_last:
                raise UserError(
                    f"{place}: cannot be written ({error}). What is listed in {LISTING} there is whole; the same "
                    "command copies the rest."
                ) from error
            print(f"warning: {place}: {error}; tried again in {every:g} s", file=sys.stderr, flush=True)
        if is_last:
            return
        while not asked and time.monotonic() - began_at < every:
            time.sleep(min(_LOOK_SECONDS, every))


def _newest(folders: Iterable[str]) -> int:
    return max((_step_of(name) for name in folders if name == FINAL or name.startswith(PREFIX)), default=-1)


def _step_of(name: str) -> int:
    """The step of checkpoint-<step> or weights-<step>; the models of the end come after all steps, final/ last."""
    return {FINAL: sys.maxsize, AVERAGE: sys.maxsize - 1}.get(name) or int(name.rpartition("-")[2])


def _say(text: str) -> None:
    print(f"mirror: {text}", flush=True)
