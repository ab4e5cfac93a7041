"""Files at `s3://`, `gs://`, `https://` and every other address that fsspec knows: which there are, and their bytes.

In: a catalogue entry with a `url`. Out: its files, and copies of them on this disk. A file is fetched in ranges, each
asked for again when it fails, so that a broken connection costs one range. fsspec needs a package for each kind of
address (aiohttp for http and https, s3fs, gcsfs); its absence is one message. Keys and endpoints are read from where
those packages read them (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, FSSPEC_S3_ENDPOINT_URL ...).
"""

import os
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data_prep.arrivals import Note
from data_prep.catalog import DatasetEntry
from data_prep.errors import UserError
from data_prep.retries import PASSING_STATUS, StoppedError, retry_after_s, status_of, try_again
from data_prep.sources import SourceFile, readable_formats, source_format

RANGE_BYTES = 32_000_000
STALLED_S = 30  # without a byte
PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}


def list_url_files(entry: DatasetEntry) -> list[SourceFile]:
    """The files that the entry's address names, sorted by name, each with what tells if it changes.

    Raises:
        UserError: no package for such addresses, nothing there, no permission, no answer.
    """
    files, root = try_again(
        lambda: _list_files(entry), entry.url, _is_passing, lambda error: _explain(error, entry.url)
    )
    if not files:
        raise UserError(
            f"{entry.url}: no file there. Check the address; a pattern is written like s3://bucket/x/*.parquet."
        )
    names = {path: path.removeprefix(root).lstrip("/") for path in files}
    return [
        SourceFile(names[path], source_format(names[path], entry.url, entry), size, identity, path=None)
        for path, (size, identity) in sorted(files.items())
    ]


def range_opener(entry: DatasetEntry, file: SourceFile) -> tuple[Any, str]:
    """The file system, and the file's path in it, for reading parts of a file without downloading it."""
    system, path = _open_system(entry.url)
    return system, _path_of(entry.url, path, file.name)


def download_url(
    entry: DatasetEntry,
    file: SourceFile,
    target: Path,
    stop: threading.Event | None = None,
    note: Note = lambda num_bytes: None,
) -> None:
    """Copy one file to `target`, which is absent or whole; what an earlier attempt got stays and is continued.

    Args:
        note: Called with the bytes that are here, again and again.
    Raises:
        UserError: it changed since it was listed, or no answer after retries with growing waits.
    """
    what = f"{entry.url}: {file.name}" if file.name not in entry.url else entry.url
    system, path = range_opener(entry, file)
    check_unchanged(entry, file, system, path, stop)
    part = target.with_name(f"{target.name}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "ab") as out:
        note(out.tell())
        while out.tell() < file.size:
            start, end = out.tell(), min(out.tell() + RANGE_BYTES, file.size)
            out.write(read_range(system, path, start, end, what, stop, file.size))
            note(end)
        out.flush()
        os.fsync(out.fileno())
    os.replace(part, target)


def check_unchanged(
    entry: DatasetEntry, file: SourceFile, system: Any, path: str, stop: threading.Event | None = None
) -> None:
    """Raise a UserError unless the file is still what was listed."""
    what = f"{entry.url}: {file.name}"
    now = try_again(lambda: system.info(path), what, _is_passing, lambda error: _explain(error, what), stop=stop)
    if (now["size"], _identity(now)) != (file.size, file.identity):
        raise UserError(
            f"{what}: changed since this preparation listed it. What was made of it and what comes would not belong "
            "together. Begin anew: remove the preparation's folder (rm -r data/<dataset>), then the same command."
        )


def read_range(
    system: Any,
    path: str,
    start: int,
    end: int,
    what: str,
    stop: threading.Event | None = None,
    size: int | None = None,
) -> bytes:
    """Bytes [start, end) of a file on a file system of fsspec, with retries.

    Args:
        size: The whole file's, where a server that cannot send parts may send all of it.
    """

    def read() -> bytes:
        if "hf" in system.protocol:  # whose cat_file reads ahead
            with system.open(path, "rb", cache_type="none") as file:
                file.seek(start)
                data = file.read(end - start)
        else:
            data = system.cat_file(path, start=start, end=end)
        if size is not None and len(data) == size:
            data = data[start:end]
        if len(data) != end - start:
            raise ConnectionError(f"{len(data):,} of {end - start:,} bytes came")
        return data

    return try_again(read, what, _is_passing, lambda error: _explain(error, what), stop=stop)


def _list_files(entry: DatasetEntry) -> tuple[dict[str, tuple[int, str]], str]:
    url = entry.url
    system, path = _open_system(url)
    if any(letter in path for letter in "*?["):
        infos = system.glob(path, detail=True).values()
        fixed = path[: min(path.index(letter) for letter in "*?[" if letter in path)]
        root = fixed.rpartition("/")[0]
    elif urlsplit(url).scheme not in ("http", "https") and system.isdir(path):
        known = tuple(readable_formats(entry))
        infos = [info for info in system.find(path, detail=True).values() if info["name"].lower().endswith(known)]
        root = path
    else:
        infos, root = [system.info(path)], path.rpartition("/")[0]
    files = [info for info in infos if info.get("type", "file") == "file"]
    if any(info.get("size") is None for info in files):  # of a server's listing
        files = [system.info(info["name"]) for info in files]
    unsized = next((info["name"] for info in files if info.get("size") is None), None)
    if unsized is not None:
        raise UserError(f"{unsized}: the server does not say how long it is. Download it, and prepare the copy.")
    return {info["name"]: (info["size"], _identity(info)) for info in files}, root


def _path_of(url: str, path: str, name: str) -> str:
    """A listed file's path on the file system; the reverse of its name."""
    if any(letter in path for letter in "*?["):
        fixed = path[: min(path.index(letter) for letter in "*?[" if letter in path)]
        return f"{fixed.rpartition('/')[0]}/{name}"
    return path if path.endswith(f"/{name}") or path == name else f"{path.rstrip('/')}/{name}"


def _open_system(url: str) -> tuple[Any, str]:
    import fsspec

    scheme = urlsplit(url).scheme
    options: dict[str, Any] = {}
    try:
        if scheme in ("http", "https"):
            import aiohttp

            # fsspec's own limit is on the whole download: five minutes
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALLED_S, sock_read=STALLED_S)
            options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}
        return fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        package = PACKAGES.get(scheme)
        if isinstance(error, ImportError) and package is not None:
            remedy = f"Install it: pip install {package}"
        else:
            remedy = f"fsspec says: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{url}: addresses with {scheme}:// need a package that is not installed. {remedy}") from error


def _identity(info: dict[str, Any]) -> str:
    """What changes when the file does, as far as the server says so."""
    for key in (
        "ETag",
        "etag",
        "md5Hash",
        "LastModified",
        "Last-Modified",
        "mtime",
        "updated",
        "last_modified",
        "created",
    ):
        if info.get(key):
            return f"{key.lower()}:{info[key]}".replace('"', "")
    return f"size:{info['size']}"


def _is_passing(error: BaseException) -> bool:
    if isinstance(error, FileNotFoundError | PermissionError | StoppedError | ImportError):
        return False
    status = status_of(error)
    if status is not None:
        return status in PASSING_STATUS
    is_disk_error = isinstance(error, OSError) and error.errno is not None
    is_of_network = isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith("aiohttp")
    return is_of_network or not is_disk_error


def _explain(error: BaseException, what: str) -> str:
    if isinstance(error, FileNotFoundError) or status_of(error) == 404:
        return f"{what}: no such file there. Check the address."
    if isinstance(error, PermissionError) or status_of(error) in (401, 403):
        return (
            f"{what}: access is denied ({' '.join(str(error).split())[:200]}). Check the keys that its package reads "
            "(for S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or FSSPEC_S3_ANON=true for a public bucket)."
        )
    asked_s = retry_after_s(error)
    wait = f" The server asks to wait {asked_s:.0f} s." if asked_s else ""
    return (
        f"{what}: no answer that helps ({type(error).__name__}: {' '.join(str(error).split())[:200]}).{wait} "
        "Check address and network; then the same command continues."
    )
