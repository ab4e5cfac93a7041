"""The last part of a preparation: one dataset, of a bucket or of everything, out of the token runs.

In: what of each unit is kept, and the ledger. Out: shards, document map, file list and tokenizer in the dataset's
folder; and its manifest, which is not written here: all datasets of a preparation are complete together.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.align import Taken, write_document_map, write_split
from data_prep.documents import count_cut, files_path, join_source, map_path
from data_prep.ledger import LedgerError, find_imbalances
from data_prep.manifest import (
    SPLITS,
    Manifest,
    SplitInfo,
    TokenizerInfo,
    content_fingerprint,
    fill_token_id,
    token_dtype,
)
from data_prep.packing import CONCAT
from data_prep.plan import Plan, describe_files
from data_prep.progress import Progress
from data_prep.sources import SourceFile
from data_prep.write_packed import write_packed_split


def write_dataset(
    plan: Plan,
    number: int,
    files: list[tuple[int, SourceFile]],
    taken: list[Taken],
    ledger: dict[str, dict[str, Any]],
    tokenizer: TokenizerInfo,
    encoder: dict[str, Any],
    validation: dict[str, Any],
    progress: Progress,
) -> Manifest:
    """Write everything of a dataset but its manifest; what an earlier attempt wrote stays.

    Args:
        number: The bucket's number, 0 where there are none.
    Returns:
        The manifest to write when all datasets are whole.
    Raises:
        LedgerError: the counts do not add up.
    """
    bucket, folder = list(plan.outputs.items())[number]
    dtype = token_dtype(tokenizer.vocab_size)
    _copy_tokenizer(plan, folder)
    (folder / "documents").mkdir(exist_ok=True)
    write_whole(files_path(folder), describe_files(files, plan.sources))
    splits = {}
    for split in SPLITS:
        counts = [entry[split] for entry in ledger.values()]
        num_tokens = sum(each["num_tokens"] for each in counts)
        padding: dict[str, Any] = {}
        if plan.packing == CONCAT:
            shards = write_split(folder, plan.work, bucket, split, taken, plan.block_size, dtype, progress)
            remainder = num_tokens - sum(shard.num_blocks for shard in shards) * plan.block_size
        else:
            packed = write_packed_split(
                folder, plan.work, (number, bucket), split, taken, plan.block_size, dtype, plan.packing,
                fill_token_id(tokenizer), progress,
            )  # fmt: skip
            shards, remainder = packed.shards, 0
            names = ("num_padding_tokens", "lengths_sha256", "pieces_sha256")
            padding = {name: getattr(packed, name) for name in names}
        splits[split] = SplitInfo(
            num_documents=sum(each["num_documents"] for each in counts),
            num_bytes=sum(each["num_bytes"] for each in counts),
            num_tokens=num_tokens,
            num_blocks=sum(shard.num_blocks for shard in shards),
            remainder_tokens=remainder,
            documents_sha256=write_document_map(folder, plan.work, number, split, taken, plan.keep_columns),
            shards=shards,
            **padding,
        )
        num_cut, num_long = count_cut(map_path(folder, split), num_tokens, plan.block_size, plan.packing)
        splits[split] = replace(splits[split], num_cut=num_cut, num_long=num_long)
    removed = None
    if plan.filters is not None:
        from data_prep.removed import write_removed

        names = [join_source(plan.sources[n].label, file.name) for n, file in files]
        removed = write_removed(folder, plan.work, number, taken, plan.filters, names)
    problems = find_imbalances(ledger, splits, plan.block_size)
    if problems:
        raise LedgerError(f"{folder}: the ledger does not balance, so no manifest is written:\n" + "\n".join(problems))
    return Manifest(
        dataset=f"{plan.dataset}/{bucket}" if bucket else plan.dataset,
        licence=", ".join(dict.fromkeys(source.entry.licence for source in plan.sources)),
        fingerprint=content_fingerprint(tokenizer.sha256, plan.block_size, str(dtype), splits, plan.packing),
        block_size=plan.block_size,
        dtype=str(dtype),
        encoder=encoder,
        tokenizer=tokenizer,
        validation=validation,
        splits=splits,
        ledger=ledger,
        settings=plan.settings(),
        removed=removed,
        packing=plan.packing,
    )


def _copy_tokenizer(plan: Plan, folder: Path) -> None:
    """The tokenizer into the folder of a bucket, whole or not at all; without buckets it is there."""
    if (folder / "tokenizer").exists():
        return
    temporary = plan.work / "tokenizer"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(plan.tokenizer_folder, temporary)
    folder.mkdir(exist_ok=True)
    os.replace(temporary, folder / "tokenizer")


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that it is either absent or whole."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
