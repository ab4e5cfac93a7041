"""manifest.json of a prepared dataset: what was read, with what tokenizer, every count, every checksum.

In: a folder `data/<dataset>`. Out: `Manifest`. The file is written last, by rename: it exists exactly when the dataset
is complete.
"""

import hashlib
import json
import os
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.catalog import entry_names, split_bucket
from data_prep.errors import UserError
from data_prep.packing import CONCAT
from data_prep.paths import data_dir

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
WORK_NAME = ".work"  # runs and unit tables of a preparation that is not finished
BUCKETS_WORK_NAME = ".work-buckets"  # the same for one that makes all buckets of a folder
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer that made the ids; `source` is what was asked for: an id, a path, or {"train": 50000}."""

    sha256: str  # of tokenizer/tokenizer.json
    vocab_size: int  # largest id + 1, control tokens included
    bos_token_id: int | None
    eos_token_id: int
    pad_token_id: int | None
    unk_token_id: int | None
    is_bos_written: bool  # every document starts with BOS
    source: Any


@dataclass(frozen=True)
class ShardInfo:
    """One Arrow file of consecutive blocks; `file` is relative to the dataset's folder."""

    file: str
    num_blocks: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class SplitInfo:
    """One split: `num_tokens` counts separators too; with `num_padding_tokens` it equals num_blocks * block_size +
    remainder_tokens."""

    num_documents: int
    num_bytes: int  # UTF-8 bytes of the documents' text
    num_tokens: int
    num_blocks: int
    remainder_tokens: int
    documents_sha256: str  # of documents/<split>.arrow
    shards: tuple[ShardInfo, ...]
    num_cut: int | None = None  # documents that a border of blocks cuts; None: made before they were counted
    num_long: int | None = None  # documents longer than a block, which are cut in every packing
    num_padding_tokens: int = 0
    lengths_sha256: str | None = None  # of <split>/lengths.npy and documents/<split>-pieces.arrow; None for concat
    pieces_sha256: str | None = None


@dataclass(frozen=True)
class Manifest:
    """Everything that is known about a prepared dataset; `fingerprint` identifies its content, wherever it was made."""

    dataset: str
    licence: str | None
    fingerprint: str
    block_size: int
    dtype: str
    encoder: dict[str, Any]  # name, and what it has proved, or why it is the reference
    tokenizer: TokenizerInfo
    validation: dict[str, Any]
    splits: dict[str, SplitInfo]
    ledger: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    # what was left out, where there were filters: the names of the rules, the versions of libraries, sha256 by file
    removed: dict[str, Any] | None = None
    packing: str = CONCAT
    format_version: int = field(default=FORMAT_VERSION)

    @property
    def num_train_tokens(self) -> int:
        """Tokens in the blocks of the train split, without padding."""
        train = self.splits["train"]
        return train.num_blocks * self.block_size - train.num_padding_tokens


def content_fingerprint(
    tokenizer_sha256: str, block_size: int, dtype: str, splits: dict[str, SplitInfo], packing: str = CONCAT
) -> str:
    """sha256 (hex) over the tokenizer, the block size and every shard's checksum: equal exactly when the blocks are."""
    shards = {name: [shard.sha256 for shard in split.shards] for name, split in splits.items()}
    parts = [FORMAT_VERSION, tokenizer_sha256, block_size, dtype, shards]
    if packing != CONCAT:
        parts += [packing, {name: split.lengths_sha256 for name, split in splits.items()}]
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def load_manifest(folder: str | Path) -> Manifest:
    """The manifest of a prepared dataset.

    Raises:
        UserError: no such folder, not complete, unreadable, or of another format version; with the command that mends
        it.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not path.is_file():
        if is_interrupted(folder):
            raise UserError(
                f"{folder}: its preparation was interrupted, {MANIFEST_NAME} does not exist yet. "
                f"The same command continues it: {prep_command(folder)}"
            )
        inside = sorted(str(each.parent) for each in folder.glob(f"*/{MANIFEST_NAME}"))
        if inside:
            raise UserError(f"{folder} is no dataset but holds datasets. Name one of them: {', '.join(inside)}")
        if folder.is_dir():
            raise UserError(
                f"{folder} is not a prepared dataset: it has no {MANIFEST_NAME}. Prepare it with: "
                f"{prep_command(folder)}"
            )
        raise UserError(
            f"{folder} does not exist: the dataset was never prepared. Prepare it with: {prep_command(folder)}"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{path}: format_version is {raw['format_version']} but this code reads {FORMAT_VERSION}. "
                f"Prepare the dataset again: rm -r {shlex.quote(str(folder))} && {prep_command(folder)}"
            )
        return _from_json(raw)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}). "
            f"Prepare the dataset again: rm -r {shlex.quote(str(folder))} && {prep_command(folder)}"
        ) from error


def is_interrupted(folder: Path) -> bool:
    """Whether a preparation of this dataset, or of all buckets beside it, was begun and not finished."""
    return (folder / WORK_NAME).is_dir() or (folder.parent / BUCKETS_WORK_NAME).is_dir()


def save_manifest(manifest: Manifest, folder: Path) -> None:
    """Write manifest.json so that it is either absent or whole, also after a power cut."""
    path = folder / MANIFEST_NAME
    temporary = path.with_suffix(".json.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(asdict(manifest), file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prep_command(folder: str | Path) -> str:
    """The command that prepares `folder`, as exact as its name allows."""
    folder = Path(folder)
    for name, made in ((folder.name, folder), (f"{folder.parent.name}/{folder.name}", folder.parent)):
        if name in entry_names() or split_bucket(name)[1] is not None:
            lies_where_it_should = made.absolute() == (data_dir() / made.name).absolute()
            return f"make prep DATASET={name}" + ("" if lies_where_it_should else f" OUT={shlex.quote(str(made))}")
    return f"make prep DATASET=<name or path of the text> OUT={shlex.quote(str(folder))}"


def sha256_of(path: Path) -> str:
    """The sha256 (hex) of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fill_token_id(tokenizer: TokenizerInfo) -> int:
    """The id that padding is written as: the tokenizer's own for it, else EOS."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits (vocabulary <= 65,536), else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def _from_json(raw: dict[str, Any]) -> Manifest:
    splits = {
        name: SplitInfo(**{**split, "shards": tuple(ShardInfo(**shard) for shard in split["shards"])})
        for name, split in raw["splits"].items()
    }
    return Manifest(**{**raw, "tokenizer": TokenizerInfo(**raw["tokenizer"]), "splits": splits})
