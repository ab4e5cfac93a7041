"""Datasets of the Hugging Face Hub: which files a split has, and one file at a time on this disk.

In: a catalogue entry with a repository. Out: its files, pinned to one commit, and paths in the Hub's cache.
`HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` mean what they mean to every Hugging Face library. The list of
files is remembered under `data/.hub/`, so that a dataset whose files are in the cache can be prepared again without
network.
"""

import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.arrivals import Note, bar_for
from data_prep.catalog import DatasetEntry
from data_prep.errors import UserError, did_you_mean
from data_prep.paths import data_dir
from data_prep.retries import PASSING_STATUS, Result, status_of, try_again
from data_prep.sources import SourceFile, source_format


def list_hub_files(entry: DatasetEntry, is_remembered: bool = True) -> list[SourceFile]:
    """The files of the entry's splits, in the repository's order, pinned to the commit that `entry.revision` is now.

    Args:
        is_remembered: Write the list down for times without network.

    Raises:
        UserError: no network, offline and never listed, gated, no such dataset, revision, config or split.
    """
    remembered = _memory_path(entry)
    try:
        files = with_retries(lambda: _list_files(entry), f"the file list of {entry.repository}")
    except UserError as error:
        if error.__cause__ is None or not _is_unreachable(error.__cause__) or not remembered.exists():
            raise
        print(f"{entry.repository}: the Hub is not reachable; using the file list of the last time.", file=sys.stderr)
        return [SourceFile(**file) for file in json.loads(remembered.read_text(encoding="utf-8"))]
    if not is_remembered:
        return files
    remembered.parent.mkdir(parents=True, exist_ok=True)
    temporary = remembered.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps([asdict(file) for file in files]), encoding="utf-8")
    os.replace(temporary, remembered)
    return files


def cached_path(entry: DatasetEntry, file: SourceFile) -> Path:
    """Where one file lies in the Hub's cache, if it is there."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=entry.repository, repo_type="dataset")
    return Path(HF_HUB_CACHE) / folder / "snapshots" / _commit(file) / file.name


def download_file(
    entry: DatasetEntry,
    file: SourceFile,
    folder: Path | None = None,
    stop: threading.Event | None = None,
    note: Note | None = None,
) -> str:
    """The path of one file, downloaded if it is not there yet.

    Args:
        folder: Where to put it; None is the Hub's cache, where it stays.
        stop: Set when nobody wants it any more.
        note: Called with the bytes that are here, again and again.
    Raises:
        UserError: as `list_hub_files`, after retries with growing waits.
    """
    from huggingface_hub import hf_hub_download

    def download() -> str:
        where = {"repo_type": "dataset", "revision": _commit(file), "local_dir": folder}
        path = hf_hub_download(entry.repository, file.name, tqdm_class=bar_for(note), **where)
        if os.path.getsize(path) != file.size:  # what was cut short and yet reported as whole
            size = os.path.getsize(path)
            os.unlink(path)
            raise IncompleteReadError(f"{size:,} of {file.size:,} bytes came")
        return path

    return with_retries(download, f"{entry.repository}: {file.name}", is_started=True, stop=stop)


def range_opener(entry: DatasetEntry, file: SourceFile) -> tuple[Any, str]:
    """The file system, and the file's path in it, for reading parts of a file without downloading it."""
    from huggingface_hub import HfFileSystem

    return HfFileSystem(), f"datasets/{entry.repository}@{_commit(file)}/{file.name}"


def _commit(file: SourceFile) -> str:
    return file.identity.removeprefix("commit:")


class IncompleteReadError(ConnectionError):
    """A download ended early."""


def with_retries(
    action: Callable[[], Result],
    what: str,
    *,
    is_started: bool = False,
    waits_s: Sequence[float] | None = None,
    stop: threading.Event | None = None,
) -> Result:
    """`action()`, tried again with growing waits while the Hub is busy or slow; once `is_started`, also while away.

    Raises:
        UserError: what went wrong and what to do, when waiting does not help.
    """
    return try_again(
        action, what, lambda error: _is_passing(error, is_started), lambda error: _explain(error, what), waits_s, stop
    )


def _list_files(entry: DatasetEntry) -> list[SourceFile]:
    from datasets import get_dataset_config_names, load_dataset_builder
    from huggingface_hub import HfApi

    commit = HfApi().dataset_info(entry.repository, revision=entry.revision).sha
    configs = get_dataset_config_names(entry.repository, revision=commit)
    if entry.config is not None and entry.config not in configs:
        raise UserError(f"{entry.repository}: has no config {entry.config}. {did_you_mean(entry.config, configs)}")
    if entry.config is None and len(configs) > 1 and "default" not in configs:
        raise UserError(
            f"{entry.repository}: has several configs: {', '.join(configs)}. "
            f"Say which in a file of your own, data_prep/datasets/<name>.yaml, with the key config (copy fineweb.yaml)."
        )
    builder = load_dataset_builder(entry.repository, entry.config, revision=commit)
    found = dict(builder.config.data_files or {})
    files = []
    for split, theirs in entry.splits.items():
        if theirs not in found:
            raise UserError(
                f"{entry.repository}: has no split {theirs}. {did_you_mean(theirs, [str(name) for name in found])}"
            )
        prefix = f"hf://datasets/{entry.repository}@{commit}/"
        names = [str(url).removeprefix(prefix) for url in found[theirs]]
        sizes = {}
        for start in range(0, len(names), 100):
            infos = HfApi().get_paths_info(
                entry.repository, names[start : start + 100], revision=commit, repo_type="dataset"
            )
            sizes.update({info.path: info.size for info in infos})
        for name in names:
            kind = source_format(name, entry.repository, entry)
            files.append(SourceFile(name, kind, sizes[name], f"commit:{commit}", split))
    return files


def _memory_path(entry: DatasetEntry) -> Path:
    endpoint = os.environ.get("HF_ENDPOINT", "")
    key = json.dumps([endpoint, entry.repository, entry.config, entry.revision, entry.splits], sort_keys=True)
    name = f"{entry.repository.replace('/', '--')}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
    return data_dir() / ".hub" / name


def _is_unreachable(error: BaseException) -> bool:
    """No answer at all: offline by setting, no route, no name service, a timeout."""
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    is_not_found = isinstance(error, FileNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
    return status_of(error) is None and isinstance(error, OSError | HTTPError) and not is_not_found


def _is_passing(error: BaseException, is_started: bool) -> bool:
    if _is_offline_by_setting():
        return False
    # A connection that was made and then broke: ReadTimeout, ReadError, RemoteProtocolError ... of the HTTP library.
    is_broken = isinstance(error, TimeoutError) or any(
        word in type(error).__name__ for word in ("Timeout", "Read", "Remote")
    )
    return (
        status_of(error) in PASSING_STATUS
        or is_broken
        or (is_started and _is_unreachable(error) and not _is_disk_error(error))
    )


def _is_offline_by_setting() -> bool:
    from huggingface_hub.constants import is_offline_mode

    return is_offline_mode()


def _is_disk_error(error: BaseException) -> bool:
    is_of_network = isinstance(error, ConnectionError | TimeoutError)
    return isinstance(error, OSError) and error.errno is not None and not is_of_network


def _explain(error: BaseException, what: str) -> str:
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    repository = what.removeprefix("the file list of ").split(":")[0]
    page = f"{ENDPOINT}/datasets/{repository}"
    if isinstance(error, GatedRepoError) or "is a gated dataset" in str(error):
        return (
            f"{what}: the dataset is gated. Accept its terms at {page}, then log in with `hf auth login` (or "
            "set HF_TOKEN)."
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{what}: the Hub has no such dataset, or it is private. Check the spelling at {page}; for a "
            "private one: `hf auth login`."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{what}: the revision does not exist. See {page}/tree/main for those that do."
    if _is_disk_error(error):
        return (
            f"{what}: {error.strerror} ({error.filename}). Make room or set HF_HOME to another disk; then the "
            "same command continues."
        )
    if _is_offline_by_setting():
        return (
            f"{what} is not in the cache and HF_HUB_OFFLINE is set, so it cannot be downloaded. Unset "
            "HF_HUB_OFFLINE, with network."
        )
    if _is_unreachable(error):
        return (
            f"{what}: {ENDPOINT} cannot be reached ({type(error).__name__}: {error}). "
            "Check the network or HF_ENDPOINT; then the same command continues."
        )
    return f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
