"""What a preparation will do, settled before anything is written.

In: the options of the command line. Out: a `Plan`: sources, tokenizer, block size, folder, and the settings that
identify the result. Sources that lie here are listed; the network is not touched, so that a finished dataset is
recognised offline and at once.
"""

import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from data_prep.buckets import Bucket, bucket_names, condition_columns, parse_buckets, split_conditions
from data_prep.catalog import DatasetEntry
from data_prep.errors import UserError
from data_prep.filter_settings import Filters, load_filters, make_filters
from data_prep.manifest import BUCKETS_WORK_NAME, WORK_NAME, sha256_of
from data_prep.paths import data_dir, dataset_folder
from data_prep.sizes import parse_count
from data_prep.sources import Source, SourceFile, list_local_files, parse_sources

BYTES_PER_TOKEN = 4  # of English under a vocabulary of 32k to 50k; only for estimates
MIN_VOCAB_SIZE = 256 + 4  # every byte and the four control tokens


@dataclass(frozen=True)
class Options:
    """The words of `prep`; None is the dataset's default."""

    specs: tuple[str, ...]
    tokenizer: str | None = None
    block_size: int | None = None
    out: str | None = None
    text_column: str | None = None
    num_proc: int | None = None
    val_fraction: float | None = None
    val_max_tokens: int = 10_000_000
    max_tokens: int | None = None
    max_docs: int | None = None
    on_bad_record: str | None = None
    split_lines: bool = False
    buckets: Sequence[str] | None = None  # name=condition
    filters: str | None = None  # a YAML file, or none
    encoder: str = "auto"  # or hf
    sample: str | None = None  # first or spread
    skip_failed: bool = False
    keep_downloads: bool = False
    tokenized: str | None = None  # one of catalog.TOKENIZED
    packing: str | None = None  # one of PACKINGS


@dataclass(frozen=True)
class Plan:
    """What to do. `local_files` holds the files of the sources that lie here, by the source's number.

    With buckets `folder` holds one dataset for each, and none itself.
    """

    folder: Path
    dataset: str
    sources: tuple[Source, ...]
    local_files: dict[int, list[SourceFile]]
    ignored_files: dict[int, Counter]
    tokenizer: dict[str, Any]  # {"train": 50000}, {"id": ...} or {"path": ..., "sha256": ...}
    block_size: int
    val_fraction: float
    val_max_tokens: int
    max_tokens: int | None
    max_docs: int | None
    keep_columns: dict[str, str]  # of all sources together, and those that the buckets are by
    buckets: tuple[Bucket, ...]
    packing: str
    filters: Filters | None = None
    is_spread: bool = False  # a cap takes row groups drawn over all files
    skip_failed: bool = False
    keep_downloads: bool = False  # files of the Hub stay in its cache
    failed: dict[int, str] = field(default_factory=dict)  # sources whose files could not be listed, and why

    @property
    def outputs(self) -> dict[str, Path]:
        """The folder of each dataset that is made, by its bucket; of the one without buckets by ""."""
        return {name: self.folder / name for name in bucket_names(self.buckets)}

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer is made: beside the blocks; with buckets in the working folder, and each gets a copy."""
        return self.work / "shared_tokenizer" if self.buckets else self.folder / "tokenizer"

    @property
    def work(self) -> Path:
        """The working folder."""
        return self.folder / (BUCKETS_WORK_NAME if self.buckets else WORK_NAME)

    def settings(self) -> dict[str, Any]:
        """What, with the files' content, determines the result: equal settings and files give equal bytes."""
        sources = []
        for source in self.sources:
            entry = source.entry
            where = {
                "repository": entry.repository,
                "config": entry.config,
                "revision": entry.revision,
                "splits": entry.splits,
            }
            sources.append(
                {
                    "label": source.label,
                    **(where if entry.repository else {"url": entry.url} if entry.url else {}),
                    "text_column": entry.text_column,
                    "keep_columns": entry.keep_columns,
                    "document_start": entry.document_start,
                    "on_bad_record": entry.on_bad_record,
                    "max_documents": source.max_documents,
                    "split_lines": source.is_split_by_line,
                    **({"tokenized": entry.tokenized} if entry.tokenized else {}),
                }
            )
        return {
            "sources": sources,
            "local_files": digest_files(self.local_files),
            "tokenizer": self.tokenizer,
            "block_size": self.block_size,
            "packing": self.packing,
            "val_fraction": self.val_fraction,
            "val_max_tokens": self.val_max_tokens,
            "max_tokens": self.max_tokens,
            "max_docs": self.max_docs,
            "buckets": {bucket.name: bucket.condition for bucket in self.buckets},
            "filters": self.filters.settings() if self.filters else {},
            "sample": "spread" if self.is_spread else "first",
            "skip_failed": self.skip_failed,
        }


def make_plan(options: Options) -> Plan:
    """Settle names, defaults and files.

    Raises:
        UserError: an unknown source, a setting out of range, defaults that contradict each other.
    """
    sources = parse_sources(
        list(options.specs),
        text_column=options.text_column,
        on_bad_record=options.on_bad_record,
        split_lines=options.split_lines,
        tokenized=options.tokenized,
    )
    entries = [source.entry for source in sources]
    _check_tokenized(entries, options.tokenizer)
    if options.out is None and len(sources) > 1:
        raise UserError("prep: several sources make one dataset, which needs a name. Add --out data/<name>.")
    if "://" in (options.out or ""):
        raise UserError(
            f"prep: --out is {options.out} but blocks are written to a disk of this machine, since training maps them "
            "into memory. Give a folder, and copy it where you need it."
        )
    folder = Path(options.out) if options.out is not None else data_dir() / entries[0].name
    fraction = entries[0].val_fraction if options.val_fraction is None else options.val_fraction
    if not 0 <= fraction < 1:
        raise UserError(f"prep: --val-fraction is {fraction} but must be at least 0 and below 1. The default is 0.01.")
    block_size = options.block_size or _only_default("--block-size", [entry.default_block_size for entry in entries])
    tokenizer = options.tokenizer or _only_default("--tokenizer", [entry.default_tokenizer for entry in entries])
    conditions = split_conditions(options.buckets or ())
    conditions = conditions or _only_default("--buckets", [entry.buckets for entry in entries])
    buckets = parse_buckets(conditions, "prep: --buckets ")
    filters = _make_filters(options.filters, entries)
    if filters is not None and any(entry.tokenized for entry in entries):
        raise UserError(f"prep: {entries[0].name} is tokenized already: filters are for text. Add --filters none.")
    kept = {name: kind for entry in entries for name, kind in entry.keep_columns.items()}
    sample = options.sample or _only_default("--sample", [entry.sample for entry in entries])
    lists, failed = _list_local(sources, options.skip_failed)
    return Plan(
        folder=folder,
        dataset=folder.name,
        sources=tuple(sources),
        local_files={number: files for number, (files, _) in lists.items()},
        ignored_files={number: ignored for number, (_, ignored) in lists.items()},
        tokenizer=parse_tokenizer(tokenizer),
        block_size=block_size,
        val_fraction=fraction,
        val_max_tokens=options.val_max_tokens,
        max_tokens=options.max_tokens,
        max_docs=options.max_docs,
        keep_columns={**kept, **condition_columns(buckets, kept, "prep: --buckets ")},
        buckets=buckets,
        is_spread=sample == "spread",
        skip_failed=options.skip_failed,
        keep_downloads=options.keep_downloads,
        failed=failed,
        packing=options.packing or _only_default("--packing", [entry.packing for entry in entries]),
        filters=filters,
    )


def _make_filters(option: str | None, entries: list[DatasetEntry]) -> Filters | None:
    if option == "none":
        return None
    if option is not None:
        return make_filters(load_filters(option), f"{option}: ", option)
    raw = _only_default("--filters", [entry.filters for entry in entries])
    return make_filters(raw, f"{entries[0].name}.yaml: filters.") if raw else None


def _check_tokenized(entries: list[DatasetEntry], tokenizer: str | None) -> None:
    if not any(entry.tokenized for entry in entries):
        return
    text = next((entry.name for entry in entries if not entry.tokenized), None)
    if text is not None:
        raise UserError(
            f"prep: {text} is text but another source holds ids. Prepare them apart, and mix them in a recipe."
        )
    if tokenizer is None or tokenizer.startswith("train:"):
        raise UserError(
            f"prep: {entries[0].name} is tokenized already, and only with its tokenizer its ids mean something. "
            "Give the one that made them: --tokenizer <Hub id or folder>."
        )


def _list_local(
    sources: list[Source], skip_failed: bool
) -> tuple[dict[int, tuple[list[SourceFile], Counter]], dict[int, str]]:
    """The files of each source that lies here, and why some cannot be listed, where those may be left out."""
    lists, failed = {}, {}
    for number, source in enumerate(sources):
        if source.entry.path is None:
            continue
        try:
            lists[number] = list_local_files(source)
        except UserError as error:
            if not skip_failed:
                raise
            lists[number], failed[number] = ([], Counter()), str(error)
    return lists, failed


def parse_tokenizer(value: str | dict[str, int]) -> dict[str, Any]:
    """`train:50000`, a folder, or a Hub id, as the manifest's tokenizer.source says it.

    Raises:
        UserError: a vocabulary size that is no count or too small for bytes and control tokens.
    """
    if isinstance(value, str) and value.startswith("train:"):
        try:
            value = {"train": parse_count(value.removeprefix("train:"))}
        except ValueError as error:
            raise UserError(f"--tokenizer is {value} but {error}. Write for example train:50000.") from None
    if isinstance(value, dict):
        if value["train"] < MIN_VOCAB_SIZE:
            raise UserError(
                f"--tokenizer is train:{value['train']} but a byte-level vocabulary has at least "
                f"{MIN_VOCAB_SIZE} entries "
                "(256 bytes and 4 control tokens). Write for example train:4096."
            )
        return dict(value)
    path = Path(value)
    if (path / "tokenizer.json").is_file():
        return {"path": value, "sha256": sha256_of(path / "tokenizer.json")}
    if path.exists() and not path.is_dir():
        raise UserError(f"--tokenizer is {value} but that is a file. Give the folder that holds tokenizer.json.")
    return {"path": value, "sha256": None} if path.is_dir() else {"id": value}


def digest_files(files: dict[int, list[SourceFile]]) -> str:
    """One hash over names and content of local files: where they lie does not matter."""
    rows = [[number, file.name, file.size, file.identity] for number, each in sorted(files.items()) for file in each]
    return hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()


def val_threshold(plan: Plan, files: list[tuple[int, SourceFile]]) -> dict[str, Any]:
    """The manifest's `validation`: a document whose 64-bit hash lies below `threshold` is validation.

    Fixed before anything is encoded.
    """
    estimate = 0.0  # tokens
    for number, source in enumerate(plan.sources):
        entry = source.entry
        sizes = [
            file.size * 2 if entry.tokenized and file.format not in ("text", "python", "jsonl") else file.text_bytes
            for n, file in files
            if n == number
        ]
        num_tokens = entry.num_tokens or (entry.num_bytes or sum(sizes)) / BYTES_PER_TOKEN
        if source.max_documents and entry.num_documents:
            num_tokens *= min(source.max_documents / entry.num_documents, 1)
        estimate += num_tokens
    estimate = max(int(min(estimate, plan.max_tokens or estimate)), 1)
    fraction = min(plan.val_fraction, plan.val_max_tokens / estimate)
    return {
        "hash": "XXH3, 64 bits, of the UTF-8 text",
        "threshold": int(fraction * 2**64),
        "fraction": fraction,
        "estimated_tokens": estimate,
        "official": [source.label for source in plan.sources if source.has_official_validation],
    }


def describe_files(files: list[tuple[int, SourceFile]], sources: tuple[Source, ...]) -> str:
    """documents/files.jsonl: one line per file, in the order of its numbers."""
    lines = []
    for number, file in files:
        row = {"source": sources[number].label, **asdict(replace(file, path=None))}
        del row["path"]
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)


def other_folder(plan: Plan, suffix: str) -> str:
    """The command that prepares the same under another name."""
    folder = plan.folder.with_name(f"{plan.folder.name}-{suffix}")
    words = " ".join(shlex.quote(each.path or each.repository or each.url) for each in (s.entry for s in plan.sources))
    entry = plan.sources[0].entry
    named = entry.name if len(plan.sources) == 1 and plan.folder == dataset_folder(entry.name) else words
    filters = f"--filters {shlex.quote(plan.filters.path)}" if plan.filters and plan.filters.path else ""
    options = f" PREP_ARGS={shlex.quote(filters)}" if filters else ""
    if plan.buckets and len(plan.sources) == 1 and parse_buckets(entry.buckets, "") == plan.buckets:
        named = f"{entry.name}/{plan.buckets[0].name}"
    elif plan.buckets:
        conditions = " ".join(shlex.quote(f"{bucket.name}={bucket.condition}") for bucket in plan.buckets)
        options = f" PREP_ARGS={shlex.quote(f'--buckets {conditions} {filters}'.rstrip())}"
    return f"make prep DATASET={shlex.quote(named)} OUT={shlex.quote(str(folder))}{options}"


def _only_default(flag: str, values: list[Any]) -> Any:
    if any(value != values[0] for value in values):
        raise UserError(
            f"prep: the sources have different defaults for {flag}: {', '.join(map(str, values))}. Say which "
            f"with {flag}."
        )
    return values[0]
