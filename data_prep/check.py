"""Recount everything from the files and compare it with the manifest.

In: a prepared dataset. Out: a list of what does not hold, each naming its file; empty when every count and checksum
does.
"""

import json
from pathlib import Path

import numpy as np

from data_prep.arrays import to_numpy
from data_prep.blocks import Blocks, lengths_path
from data_prep.check_packed import check_packed
from data_prep.documents import DocumentMap, count_cut, map_path
from data_prep.errors import UserError
from data_prep.ledger import find_imbalances
from data_prep.manifest import Manifest, content_fingerprint, load_manifest, sha256_of
from data_prep.packing import PACKINGS
from data_prep.pieces import pieces_path
from data_prep.progress import Progress
from data_prep.removed import check_removed
from data_prep.tokenizer_folder import describe_tokenizer


def check_dataset(folder: Path) -> Manifest:
    """Check a prepared dataset.

    Raises:
        UserError: all that does not hold, one line each.
    """
    manifest = load_manifest(folder)
    problems = [
        *_check_tokenizer(folder, manifest),
        *find_imbalances(manifest.ledger, manifest.splits, manifest.block_size),
    ]
    num_bytes = sum(shard.num_bytes for split in manifest.splits.values() for shard in split.shards)
    with Progress("checksums", num_bytes) as progress:
        found = {split: _check_files(folder, manifest, split, progress) for split in manifest.splits}
    for split in manifest.splits:  # a damaged file says nothing about counts
        problems += found[split] or _check_counts(folder, manifest, split)
    if manifest.removed is not None:
        problems += check_removed(folder, manifest)
    expected = content_fingerprint(
        manifest.tokenizer.sha256, manifest.block_size, manifest.dtype, manifest.splits, manifest.packing
    )
    if manifest.fingerprint != expected:
        problems.append(
            f"{folder}/manifest.json: fingerprint is {manifest.fingerprint[:12]}... but its own checksums give "
            f"{expected[:12]}..."
        )
    if problems:
        raise UserError(
            "\n".join(problems) + f"\n{folder}: {len(problems)} of its facts do not hold. It must not be trained on. "
            f"Restore the named files from a copy, or prepare again: rm -r {folder} and the command that made it."
        )
    return manifest


def _check_tokenizer(folder: Path, manifest: Manifest) -> list[str]:
    path = folder / "tokenizer" / "tokenizer.json"
    if not path.exists():
        return [f"{path}: is missing"]
    if sha256_of(path) != manifest.tokenizer.sha256:
        return [f"{path}: its sha256 is not the manifest's; it is not the tokenizer that made the blocks"]
    if describe_tokenizer(folder / "tokenizer", manifest.tokenizer.source) != manifest.tokenizer:
        return [f"{folder}/tokenizer/tokenizer_config.json: names other control tokens than the manifest"]
    return []


def _check_files(folder: Path, manifest: Manifest, split: str, progress: Progress) -> list[str]:
    problems = []
    info = manifest.splits[split]
    expected = [(shard.file, shard.num_bytes, shard.sha256) for shard in info.shards]
    for path, sha256 in (
        (map_path(folder, split), info.documents_sha256),
        (lengths_path(folder, split), info.lengths_sha256),
        (pieces_path(folder, split), info.pieces_sha256),
    ):
        if sha256 is not None:
            expected.append((path.relative_to(folder).as_posix(), None, sha256))
    for name, num_bytes, sha256 in expected:
        path = folder / name
        if not path.exists():
            problems.append(f"{path}: is missing")
        elif num_bytes is not None and path.stat().st_size != num_bytes:
            problems.append(f"{path}: has {path.stat().st_size:,} bytes but the manifest says {num_bytes:,}")
        elif sha256_of(path) != sha256:
            problems.append(f"{path}: its content changed (sha256 differs from the manifest)")
        progress.add_input(num_bytes or 0)
    extra = {path.name for path in (folder / split).glob("*.arrow")} - {Path(shard.file).name for shard in info.shards}
    problems += [f"{folder}/{split}/{name}: is not in the manifest" for name in sorted(extra)]
    problems += _check_dataset_files(folder / split, [Path(shard.file).name for shard in info.shards], manifest)
    return problems


def _check_dataset_files(folder: Path, names: list[str], manifest: Manifest) -> list[str]:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        feature = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))["features"]["input_ids"]
        if [each["filename"] for each in state["_data_files"]] != names:
            return [f"{folder}/state.json: lists other files than the manifest"]
        if (feature["length"], feature["feature"]["dtype"]) != (manifest.block_size, manifest.dtype):
            return [f"{folder}/dataset_info.json: describes other blocks than the manifest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{folder}/state.json or dataset_info.json: missing or damaged ({type(error).__name__}: {error})"]
    return []


def _check_counts(folder: Path, manifest: Manifest, split: str) -> list[str]:
    """Count tokens, ends of documents and the document map again."""
    info, tokenizer = manifest.splits[split], manifest.tokenizer
    num_in_shards = sum(shard.num_blocks for shard in info.shards)
    if info.num_blocks != num_in_shards:
        return [f"{folder}/manifest.json: {split} has num_blocks {info.num_blocks:,} but its shards {num_in_shards:,}"]
    blocks, documents = Blocks(folder, split), DocumentMap(folder, split)
    problems = []
    first = to_numpy(documents.first_tokens).astype(np.int64)
    if len(documents) != info.num_documents:
        problems.append(
            f"{map_path(folder, split)}: has {len(documents):,} documents but the manifest says {info.num_documents:,}"
        )
    if int(to_numpy(documents.table["num_bytes"]).sum(dtype=np.int64)) != info.num_bytes:
        problems.append(f"{map_path(folder, split)}: its bytes are not the manifest's {info.num_bytes:,}")
    if len(first) and (first[0] != 0 or (np.diff(first) <= 0).any() or first[-1] >= info.num_tokens):
        problems.append(f"{map_path(folder, split)}: its documents are not one after the other")
        return problems
    cut = count_cut(map_path(folder, split), info.num_tokens, manifest.block_size, manifest.packing)
    if info.num_cut is not None and cut != (info.num_cut, info.num_long):
        problems.append(
            f"{folder}/{split}: {cut[0]:,} documents are cut and {cut[1]:,} longer than a block but the manifest says "
            f"{info.num_cut:,} and {info.num_long:,}"
        )
    if manifest.packing not in PACKINGS or blocks.is_padded != (info.lengths_sha256 is not None):
        return [*problems, f"{folder}/manifest.json: packing is {manifest.packing}, which its files are not made by"]
    if blocks.is_padded:
        return problems + check_packed(blocks, documents)
    ends = np.append(first[1:], info.num_tokens)[: len(first)]
    num_inside = np.searchsorted(ends, blocks.num_tokens, side="right")  # the others end in the remainder
    num_eos = num_bos = largest = 0
    for shard in range(len(info.shards)):
        tokens = blocks.shard_tokens(shard)
        num_eos += int(np.count_nonzero(tokens == tokenizer.eos_token_id))
        num_bos += int(np.count_nonzero(tokens == tokenizer.bos_token_id)) if tokenizer.is_bos_written else 0
        largest = max(largest, int(tokens.max(initial=0)))
    if largest >= tokenizer.vocab_size:
        problems.append(f"{folder}/{split}: holds token {largest} but the vocabulary has {tokenizer.vocab_size:,}")
    num_eos_expected = int(num_inside)
    num_bos_expected = int(np.searchsorted(first, blocks.num_tokens)) if tokenizer.is_bos_written else 0
    if tokenizer.is_bos_written and tokenizer.bos_token_id == tokenizer.eos_token_id:
        num_eos_expected = num_bos_expected = num_eos_expected + num_bos_expected
    if num_eos != num_eos_expected:
        problems.append(
            f"{folder}/{split}: has {num_eos:,} ends of document (EOS) but {num_eos_expected:,} documents end "
            "in its blocks"
        )
    if num_bos != num_bos_expected:
        problems.append(f"{folder}/{split}: has {num_bos:,} BOS but {num_bos_expected:,} documents start in its blocks")
    if num_inside and (blocks.token_at(ends[:num_inside] - 1) != tokenizer.eos_token_id).any():
        problems.append(f"{folder}/{split}: the document map and the blocks disagree on where documents end")
    return problems
