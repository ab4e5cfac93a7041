"""The files of a preparation as paths on this disk; what lies elsewhere is downloaded when it is needed.

In: the numbers of files. Out: local paths. A file of the Hub or of an address (data_prep/urls.py) is downloaded into
the working folder, a few files ahead of the encoding, and removed when its units are done: at any time there are at
most FILES_AHEAD files beyond those that units are being made of, which are FILES_AT_ONCE at most. Files that are in the
Hub's cache already are read there and stay, as do all with `is_kept`.

With `sample: spread` of a Parquet file only its footer and some row groups are read: the local file has its full length
and holes where nothing was read, so that everything else reads it as it reads a whole one.
"""

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from data_prep import hub, urls
from data_prep.arrivals import Arrivals
from data_prep.readers import Piece
from data_prep.sources import Source, SourceFile

FILES_AHEAD = 4
FILES_AT_ONCE = 16  # that units are made of; only compressed files, which are one unit each, come to so many
_GROUPS_OF = re.compile(r"groups-\d+-\d+")


class Downloads:
    """Local paths of numbered files.

    Args:
        folder: For what is downloaded, inside the working folder.
        is_kept: Files of the Hub go to its cache and stay there.
        is_all_needed: Every file will be fetched: no cap, no parts of files.
    """

    def __init__(
        self,
        sources: tuple[Source, ...],
        files: list[tuple[int, SourceFile]],
        folder: Path,
        is_kept: bool,
        is_all_needed: bool = False,
    ):
        self.sources, self.files, self.folder, self.is_kept = sources, files, folder, is_kept
        self._arrivals = Arrivals(self._count_missing_bytes if is_all_needed else lambda: None)
        self.is_cut_from_afar = False  # Parquet files are cut into units by their ends alone, without a download
        self._threads: dict[str, _Download] = {}
        self._stop = threading.Event()
        self._current: dict[str, int] = {}  # what the unit that was taken last is made of: paths, numbers of files

    def path(self, index: int) -> str:
        """Where a file lies, or will when it is fetched."""
        number, file = self.files[index]
        if file.path is not None:
            return file.path
        entry = self.sources[number].entry
        if entry.repository is not None:
            cached = hub.cached_path(entry, file)
            if self.is_kept or cached.exists():
                return str(cached)
        return str(self.folder / str(index) / file.name)

    def groups_path(self, index: int, start: int, end: int) -> str:
        """Where a file with only these row groups will lie."""
        return str(self.folder / str(index) / f"groups-{start}-{end}" / Path(self.files[index][1].name).name)

    def footer_path(self, index: int) -> Path:
        """Where the end of a Parquet file is kept, of which parts are read."""
        return self.folder / f"{index}.footer"

    def is_remote(self, index: int) -> bool:
        """Whether the file has to come from elsewhere."""
        return self.files[index][1].path is None

    def fetch(self, index: int) -> str:
        """A file's path, downloaded if it is not there.

        Raises:
            UserError: it cannot be had, after retries.
        """
        path = self.path(index)
        if self.is_remote(index):
            self._fetch(path, lambda: self._download(index))
        return path

    def fetch_piece(self, piece: Piece) -> None:
        """Have what a piece is made of here."""
        if not self.is_remote(piece.file):
            return
        if self._is_part(piece):
            self._fetch(piece.path, lambda: self._download_groups(piece))
        else:
            self.fetch(piece.file)

    def fetch_unit(self, pieces: Iterable[Piece]) -> None:
        """Have what a unit is made of here."""
        for piece in pieces:
            self.fetch_piece(piece)

    def forget_parts(self, pieces: Iterable[Piece]) -> None:
        """Remove what was read of files in parts."""
        for piece in pieces:
            if self._is_part(piece):
                Path(piece.path).unlink(missing_ok=True)

    def ahead(self, indexes: Iterable[int]) -> None:
        """Begin to download files that will be needed soon."""
        for index in () if self.is_cut_from_afar else indexes:
            path = self.path(index)
            # its units may be done: see when they are asked for
            is_known = (self.folder / f"{index}.json").exists() or self._done_note(index).exists()
            if self.is_remote(index) and not is_known and not os.path.exists(path) and path not in self._threads:
                self._threads[path] = _Download(lambda index=index: self._download(index))

    def pieces_ahead(self, pieces: Iterable[Piece]) -> None:
        """The same for parts of files."""
        for piece in pieces:
            if self.is_remote(piece.file) and not os.path.exists(piece.path) and piece.path not in self._threads:
                self._threads[piece.path] = _Download(lambda piece=piece: self._download_groups(piece))

    def done_with(self, pieces: Iterable[Piece]) -> None:
        """A unit was taken: what it is made of is removed when the next one is made of something else."""
        now = {piece.path: piece.file for piece in pieces if self.is_remote(piece.file)}
        for path, index in self._current.items():
            if path not in now and Path(path).is_relative_to(self.folder):
                self._done_note(index).touch()
                Path(path).unlink(missing_ok=True)
        self._current = now

    def is_far(self, index: int) -> bool:
        """Whether the file has to come from elsewhere and is not here yet."""
        return self.is_remote(index) and not os.path.exists(self.path(index))

    def remembered_groups(self, index: int, read: Callable[[], list[Any]]) -> list[Any]:
        """What `read` says of a file's row groups; of one that was downloaded it is known after it was removed."""
        note = self.folder / f"{index}.json"
        if self.is_remote(index) and note.exists():
            return json.loads(note.read_text(encoding="utf-8"))
        groups = read()
        if self.is_remote(index):
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = note.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps(groups), encoding="utf-8")
            os.replace(temporary, note)
        return groups

    def range_reader(self, index: int) -> tuple[Any, str]:
        """A file system of fsspec and the file's path in it."""
        number, file = self.files[index]
        entry = self.sources[number].entry
        return (hub if entry.repository else urls).range_opener(entry, file)

    def close(self) -> None:
        """Give up what is still being downloaded."""
        self._stop.set()
        for download in self._threads.values():
            download.thread.join(timeout=1)
        self._arrivals.close()

    def _count_missing_bytes(self) -> int:
        far = (index for index in range(len(self.files)) if self.is_far(index) and not self._done_note(index).exists())
        return sum(self.files[index][1].size for index in far)

    def _done_note(self, index: int) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{index}.done"

    def _is_part(self, piece: Piece) -> bool:
        return self.is_remote(piece.file) and _GROUPS_OF.fullmatch(Path(piece.path).parent.name) is not None

    def _fetch(self, path: str, download: Callable[[], None]) -> None:
        begun = self._threads.pop(path, None)
        if begun is not None:
            begun.wait()
        if not os.path.exists(path):
            download()

    def _download(self, index: int) -> None:
        number, file = self.files[index]
        entry, path = self.sources[number].entry, Path(self.path(index))
        note = self._arrivals.of(str(path))
        if entry.url is not None:
            urls.download_url(entry, file, path, self._stop, note)
            return
        is_to_cache = not path.is_relative_to(self.folder)
        hub.download_file(entry, file, None if is_to_cache else self.folder / str(index), self._stop, note)
        if not is_to_cache:
            shutil.rmtree(self.folder / str(index) / ".cache", ignore_errors=True)

    def _download_groups(self, piece: Piece) -> None:
        """A file with holes: its length, footer and these row groups."""
        number, file = self.files[piece.file]
        system, path = self.range_reader(piece.file)
        what = f"{self.sources[number].label}: {file.name}"
        groups = json.loads((self.folder / f"{piece.file}.json").read_text(encoding="utf-8"))
        target = Path(piece.path)
        temporary = target.with_name(f"{target.name}.part")
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as out:
            out.truncate(file.size)
            out.seek(0)
            out.write(b"PAR1")
            start, end = groups[piece.start][2], groups[piece.end - 1][3]
            note = self._arrivals.of(piece.path)
            note(0)
            out.seek(start)
            out.write(urls.read_range(system, path, start, end, what, self._stop))
            note(end - start)
            footer = self.footer_path(piece.file).read_bytes()
            out.seek(file.size - len(footer))
            out.write(footer)
        os.replace(temporary, target)


class _Download:
    """One in the background; its error comes to whoever waits for it."""

    def __init__(self, action: Callable[[], None]):
        self._error: BaseException | None = None
        self._action = action
        self.thread = threading.Thread(target=self._run, daemon=True)  # so that Ctrl-C need not wait for it
        self.thread.start()

    def _run(self) -> None:
        try:
            self._action()
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        self.thread.join()
        if self._error is not None:
            raise self._error
