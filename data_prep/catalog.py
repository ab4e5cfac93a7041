"""The named datasets: data_prep/datasets/<name>.yaml, one file each.

In: a name. Out: `DatasetEntry`. A new dataset is one new YAML file; this module is the list of the keys it may have.
"""

from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from data_prep.buckets import condition_columns, parse_buckets
from data_prep.errors import UserError, did_you_mean
from data_prep.filter_settings import find_filter_problems
from data_prep.packing import CONCAT, PACKINGS

FOLDER = Path(__file__).parent / "datasets"
COLUMN_TYPES = ("string", "int64", "float64")
ON_BAD_RECORD = ("fail", "skip")


@dataclass(frozen=True)
class DatasetEntry:
    """What data_prep/datasets/<name>.yaml says. Exactly one of `repository` and `path` is set."""

    name: str
    description: str
    licence: str
    default_tokenizer: str | dict[str, int]  # a Hub id, a path, or {"train": 50000}
    default_block_size: int
    source_of_numbers: str
    repository: str | None = None  # a Hub dataset id
    config: str | None = None
    revision: str = "main"
    path: str | None = None  # a local file, folder or glob; "<stdlib>" is the running Python's standard library
    exclude_folders: tuple[str, ...] = ()
    splits: dict[str, str] = field(default_factory=lambda: {"train": "train"})  # ours -> the repository's
    text_column: str = "text"
    split: str | None = None  # "line": every line of a text file is a document; else a file is
    document_start: str | None = None  # records are parts; one that matches this regex starts a new document
    keep_columns: dict[str, str] = field(default_factory=dict)  # column -> string, int64 or float64
    buckets: dict[str, str] = field(default_factory=dict)  # name -> condition; used when <dataset>/<name> is asked for
    filters: dict[str, Any] = field(default_factory=dict)  # as data_prep/filter_settings.py reads them
    on_bad_record: str = "fail"
    packing: str = CONCAT
    val_fraction: float = 0.01
    num_documents: int | None = None
    num_bytes: int | None = None  # UTF-8 bytes of text
    num_tokens: int | None = None

    @property
    def is_padded(self) -> bool:
        """Whether its blocks have padding."""
        return self.packing != CONCAT


def entry_names() -> list[str]:
    """The names of all datasets in the catalogue, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


@cache
def load_entry(name: str) -> DatasetEntry:
    """One entry of the catalogue.

    Raises:
        UserError: no such name (shows the nearest), or the file has an unknown, missing or wrong key.
    """
    if name not in entry_names():
        raise UserError(
            f"{name} is not a listed dataset. {did_you_mean(name, entry_names())} `make datasets` lists them all."
        )
    return read_entry(FOLDER / f"{name}.yaml")


def split_bucket(name: str) -> tuple[str, str | None]:
    """`x/high` as ("x", "high") where x is a listed dataset with such a bucket; any other name as (name, None)."""
    dataset, _, bucket = name.partition("/")
    is_bucket = bucket != "" and dataset in entry_names() and bucket in load_entry(dataset).buckets
    return (dataset, bucket) if is_bucket else (name, None)


def read_entry(path: Path) -> DatasetEntry:
    """A dataset's YAML file, every key checked.

    Raises:
        UserError: all problems of the file at once.
    """
    import yaml

    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: must be a mapping of keys to values, as in the other files of its folder.")
    known = [key.name for key in fields(DatasetEntry) if key.name != "name"]
    problems = [f"unknown key {key}. {did_you_mean(str(key), known)}" for key in raw if key not in known]
    problems += [
        f"key {key} is missing"
        for key in ("description", "licence", "default_tokenizer", "default_block_size", "source_of_numbers")
        if raw.get(key) is None
    ]
    values = {key: value for key, value in raw.items() if key in known and value is not None}
    if not problems:
        problems = list(_find_problems(values))
    if problems:
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
    return DatasetEntry(name=path.stem, **{**values, "exclude_folders": tuple(values.get("exclude_folders", ()))})


def _find_problems(values: dict[str, Any]):
    if ("repository" in values) == ("path" in values):
        yield "give exactly one of repository (a Hub id) and path (local files)"
    for key in (
        "description",
        "licence",
        "source_of_numbers",
        "repository",
        "config",
        "revision",
        "path",
        "text_column",
    ):
        if key in values and not isinstance(values[key], str):
            yield f"{key} is {values[key]!r} but must be text"
    for key in ("default_block_size", "num_documents", "num_bytes", "num_tokens"):
        if key in values and (isinstance(values[key], bool) or not isinstance(values[key], int) or values[key] < 1):
            yield f"{key} is {values[key]!r} but must be a whole number above 0, or null"
    tokenizer = values["default_tokenizer"]
    trains = isinstance(tokenizer, dict) and list(tokenizer) == ["train"] and isinstance(tokenizer["train"], int)
    if not trains and not isinstance(tokenizer, str):
        yield f"default_tokenizer is {tokenizer!r} but must be a Hub id, a path, or {{train: 50000}}"
    splits = values.get("splits", {"train": "train"})
    if not isinstance(splits, dict) or not {"train"} <= set(splits) <= {"train", "validation"}:
        yield f"splits is {splits!r} but must name train, and may name validation: {{train: train, validation: test}}"
    elif "path" in values and set(splits) != {"train"}:
        yield "splits names validation but path has local files, which have no official splits; leave splits out"
    columns = values.get("keep_columns", {})
    if not isinstance(columns, dict) or not set(columns.values()) <= set(COLUMN_TYPES):
        yield f"keep_columns is {columns!r} but must map column names to one of {', '.join(COLUMN_TYPES)}"
    elif "buckets" in values:
        try:
            conditions = values["buckets"]
            if not isinstance(conditions, dict):
                raise UserError(f"buckets is {conditions!r} but must be names with conditions: {{high: score >= 3}}")
            condition_columns(parse_buckets(conditions, "buckets."), columns, "buckets.")
        except UserError as error:
            yield str(error)
    yield from find_filter_problems(values.get("filters", {}), "filters.")
    if values.get("on_bad_record", "fail") not in ON_BAD_RECORD:
        yield f"on_bad_record is {values['on_bad_record']!r} but must be one of {', '.join(ON_BAD_RECORD)}"
    if values.get("packing", CONCAT) not in PACKINGS:
        yield f"packing is {values['packing']!r} but must be one of {', '.join(PACKINGS)}"
    if values.get("split", "line") != "line":
        yield f"split is {values['split']!r} but must be line, or be left out: then a file is a document"
    if "split" in values and "document_start" in values:
        yield "split: line makes every line a document but document_start joins lines; leave one of them out"
    fraction = values.get("val_fraction", 0.01)
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction < 1:
        yield f"val_fraction is {fraction!r} but must be at least 0 and below 1"
    excluded = values.get("exclude_folders", [])
    if not isinstance(excluded, list) or not all(isinstance(name, str) for name in excluded):
        yield f"exclude_folders is {excluded!r} but must be a list of folder names"
