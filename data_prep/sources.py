"""Where documents come from: what the user named, turned into a list of files.

In: `fineweb`, `fineweb:100000`, `fineweb-edu-10bt/high`, `corpus/`, `notes/*.md`, `a.jsonl.gz`, `s3://bucket/x`,
`user/dataset`. Out: one `Source` each, with its files in a fixed order. A listed name comes first, then an address,
then what exists here, then a Hub id (it has a slash). A bare name is never looked up on the Hub.
"""

import glob
import hashlib
import os
import re
import sysconfig
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.catalog import DatasetEntry, entry_names, load_entry, split_bucket
from data_prep.errors import UserError, did_you_mean
from data_prep.sizes import parse_count

STDLIB = "<stdlib>"
# How a file is read, by the end of its name; the longest that fits counts.
FORMATS = {
    ".txt": "text",
    ".md": "text",
    ".py": "python",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".jsonl.zst": "jsonl.zst",
    ".json.gz": "jsonl.gz",
    ".json.zst": "jsonl.zst",
    ".parquet": "parquet",
}
TOKENIZED_FORMATS = {".bin": "bin", ".parquet": "parquet", ".arrow": "arrow"}
BIN_IS_A_STREAM = "--tokenized is documents but a .bin has no rows. Its documents end at EOS: --tokenized stream."
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
COMPRESSION = 2.5  # text bytes per byte of a compressed file, for estimates
DEFAULT_KEEP_COLUMNS = {"url": "string", "score": "float64", "language": "string"}
# Up to here the files' content is hashed (well under a second); beyond, size and time of change stand for it.
MAX_HASHED_BYTES = 256_000_000


@dataclass(frozen=True)
class SourceFile:
    """One file; `path` is None while it lies on the Hub only."""

    name: str  # inside its source, with forward slashes
    format: str
    size: int
    identity: str  # changes when the content does
    split: str = "train"
    path: str | None = None

    @property
    def text_bytes(self) -> float:
        """About as many bytes of text it holds; only for estimates."""
        return self.size * (1 if self.format in ("text", "python", "jsonl") else COMPRESSION)


@dataclass(frozen=True)
class Source:
    """What one word of the command line names.

    `entry` is its catalogue entry, or one made up for a path or a Hub id.
    """

    label: str
    entry: DatasetEntry
    max_documents: int | None
    is_split_by_line: bool = False

    @property
    def has_official_validation(self) -> bool:
        """Whether the source itself says what validation is; then nothing of train is held out."""
        return "validation" in self.entry.splits


def parse_sources(
    specs: list[str],
    *,
    text_column: str | None,
    on_bad_record: str | None,
    split_lines: bool,
    tokenized: str | None = None,
) -> list[Source]:
    """The sources that the words of the command line name. Looks at the file system, not at the network.

    Raises:
        UserError: an unknown name (with the nearest), a path that does not exist, a cap that is no count.
    """
    sources: list[Source] = []
    for spec in specs:
        name, cap = _split_cap(spec)
        entry = _find_entry(name)
        changes = {"text_column": text_column, "on_bad_record": on_bad_record, "tokenized": tokenized}
        if (tokenized or entry.tokenized) and entry.text_column == "text" and text_column is None:
            changes["text_column"] = "input_ids"
        entry = DatasetEntry(
            **{**entry.__dict__, **{key: value for key, value in changes.items() if value is not None}}
        )
        if entry.tokenized and (split_lines or entry.document_start):
            raise UserError(
                f"{name}: --split-lines and document_start are for text, but --tokenized says that there are ids. "
                "Leave one of them out."
            )
        if split_lines and entry.document_start:
            raise UserError(
                f"{name}: --split-lines makes every line a document but this dataset joins its lines. Leave it out."
            )
        labels = [source.label for source in sources]
        label = entry.name if entry.name not in labels else f"{entry.name}-{len(labels) + 1}"
        sources.append(Source(label, entry, cap, split_lines or entry.split == "line"))
    return sources


def list_local_files(source: Source) -> tuple[list[SourceFile], Counter]:
    """The files of a source that lies here, in reading order, and by extension how many other files its folders hold.

    Raises:
        UserError: nothing there, an extension that cannot be read, a folder that may not be read.
    """
    entry = source.entry
    root = stdlib_folder() if entry.path == STDLIB else Path(entry.path)
    formats = readable_formats(entry)
    ignored: Counter = Counter()
    if root.is_dir():
        found = sorted(_walk(root, set(entry.exclude_folders)), key=lambda path: path.relative_to(root).as_posix())
        only = {".py"} if entry.path == STDLIB else set(formats)
        names = {path: path.relative_to(root).as_posix() for path in found if _extension(path.name, formats) in only}
        ignored.update(path.suffix or path.name for path in found if path not in names)
    elif root.exists():
        names = {root: root.name}
    else:
        found = sorted(Path(name) for name in glob.glob(entry.path, recursive=True) if os.path.isfile(name))
        base = Path(os.path.commonpath([path.parent for path in found])) if found else root
        names = {path: path.relative_to(base).as_posix() for path in found}
    if not names:
        raise UserError(
            f"{entry.path}: no file to read there. Readable are {', '.join(formats)}; found: {_describe(ignored)}."
        )
    for path in names:
        if _extension(path.name, formats) is None:
            is_ids = _extension(path.name, TOKENIZED_FORMATS) is not None
            raise UserError(
                f"{path}: the extension says no format that can be read"
                f"{' as ids' if entry.tokenized else ''}. Readable are {', '.join(formats)}; "
                f"{'if it holds ids, say so with --tokenized stream' if is_ids else 'rename or convert it'}."
            )
    bin_file = next((path for path in names if _extension(path.name, formats) == ".bin"), None)
    if bin_file is not None and entry.tokenized == "documents":
        raise UserError(f"{bin_file}: {BIN_IS_A_STREAM}")
    if source.is_split_by_line and (
        record := next((p for p in names if FORMATS[_extension(p.name)] not in ("text", "python")), None)
    ):
        raise UserError(
            f"{record}: --split-lines (split: line) is for text files, but this one holds records. Prepare it without."
        )
    return _describe_files(names, formats), ignored


def stdlib_folder() -> Path:
    """The standard library of the running interpreter."""
    return Path(sysconfig.get_path("stdlib"))


def readable_formats(entry: DatasetEntry) -> dict[str, str]:
    """How the files of a dataset are read, by the end of their names."""
    return TOKENIZED_FORMATS if entry.tokenized else FORMATS


def source_format(name: str, where: str, entry: DatasetEntry) -> str:
    """How a file with this name is read.

    Raises:
        UserError: its extension says no known format.
    """
    formats = readable_formats(entry)
    extension = _extension(name, formats)
    if extension is None:
        raise UserError(f"{where}: {name} cannot be read. Readable are {', '.join(formats)}.")
    if extension == ".bin" and entry.tokenized == "documents":
        raise UserError(f"{where}: {name}: {BIN_IS_A_STREAM}")
    return formats[extension]


def _split_cap(spec: str) -> tuple[str, int | None]:
    name, colon, cap = spec.rpartition(":")
    is_of_address = cap.startswith("//") or ("://" in spec and "/" in cap)  # its scheme, or its port
    if not colon or not name or is_of_address or os.path.exists(spec) or os.sep in cap:
        return spec, None
    try:
        count = parse_count(cap)
    except ValueError as error:
        raise UserError(
            f"{spec}: the part after the colon caps the number of documents but {error}. Write for example {name}:100K."
        ) from None
    if count == 0:
        raise UserError(f"{spec}: caps the documents at 0, which leaves nothing. Write for example {name}:100K.")
    return name, count


def _find_entry(name: str) -> DatasetEntry:
    if name in entry_names():
        return replace(load_entry(name), buckets={})
    if "://" in name:
        return _entry_for(_stem(name.partition("://")[2].rstrip("/")), f"files at {name}", url=name)
    if split_bucket(name)[1] is not None:
        return load_entry(split_bucket(name)[0])
    if os.path.exists(name) or glob.glob(name, recursive=True):
        stem = Path(os.path.abspath(name)).name if os.path.isdir(name) else _stem(name)
        return _entry_for(stem, f"local files of {name}", path=name)
    if any(letter in name for letter in "*?["):
        raise UserError(
            f"{name}: no file matches. Paths are relative to {os.getcwd()}; quote the pattern so that it arrives whole."
        )
    dataset, _, bucket = name.partition("/")
    if dataset in entry_names() and (known := load_entry(dataset).buckets):
        raise UserError(f"{name}: {dataset} has no bucket {bucket}. {did_you_mean(bucket, known)}")
    is_file = _extension(name) is not None or _extension(name, TOKENIZED_FORMATS) is not None
    if HUB_ID.fullmatch(name) and not is_file:
        return _entry_for(name.split("/")[1], f"Hub dataset {name}", repository=name)
    if os.sep in name or is_file:
        raise UserError(f"{name}: no such file or folder. Paths are relative to {os.getcwd()}.")
    raise UserError(
        f"{name} is neither a listed dataset nor a file or folder here. {did_you_mean(name, entry_names())} "
        "`make datasets` lists all; "
        "a dataset of the Hub is written with its owner, owner/name."
    )


def _entry_for(name: str, description: str, **where: str) -> DatasetEntry:
    return DatasetEntry(
        name=name,
        description=description,
        licence="unknown",
        default_tokenizer={"train": 50000},
        default_block_size=2048,
        source_of_numbers="none",
        keep_columns=DEFAULT_KEEP_COLUMNS,
        **where,
    )


def _stem(name: str) -> str:
    if any(letter in name for letter in "*?["):
        parts = [part for part in Path(name).parts if not any(letter in part for letter in "*?[")]
        return Path(os.path.abspath(os.path.join(*parts))).name if parts else Path.cwd().name
    extension = _extension(name) or _extension(name, TOKENIZED_FORMATS) or ""
    return Path(name).name[: len(Path(name).name) - len(extension)] or Path(name).name


def _extension(name: str, formats: dict[str, str] = FORMATS) -> str | None:
    fits = [extension for extension in formats if name.lower().endswith(extension)]
    return max(fits, key=len) if fits else None


def _walk(root: Path, excluded: set[str]):
    def refuse(error: OSError) -> None:
        raise UserError(
            f"{error.filename}: cannot be read ({error.strerror}). Nothing is left out silently: give read permission."
        ) from error

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if name not in excluded]
        yield from (Path(folder) / name for name in names)


def _describe_files(names: dict[Path, str], formats: dict[str, str]) -> list[SourceFile]:
    stats = {path: path.stat() for path in names}
    is_hashed = sum(stat.st_size for stat in stats.values()) <= MAX_HASHED_BYTES
    files = []
    for path, stat in stats.items():
        try:
            identity = _content_hash(path) if is_hashed else f"mtime:{stat.st_mtime_ns}"
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror}). Give read permission or take it away."
            ) from error
        kind = formats[_extension(path.name, formats)]
        files.append(SourceFile(names[path], kind, stat.st_size, identity, path=str(path)))
    return files


def _content_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return "blake2b:" + hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _describe(ignored: Counter) -> str:
    return ", ".join(f"{count} {extension}" for extension, count in ignored.most_common(5)) or "nothing"
