"""Checkpoints that are complete or absent, and the choice of the one to continue from.

A checkpoint is written as `.saving/checkpoint-<step>`, then gets `checkpoint.json` (step, tokens, sizes and SHA-256 of
every file), is flushed to disk and renamed to `checkpoint-<step>`: a folder of that name is complete, always.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from clm.run_folder import list_checkpoints
from data_prep.errors import UserError
from data_prep.manifest import sha256_of

MANIFEST = "checkpoint.json"
SAVING = ".saving"
PREFIX = "checkpoint-"


def publish_checkpoint(temporary: Path, facts: dict[str, Any]) -> Path:
    """Make a fully written temporary checkpoint the real one.

    Args:
        temporary: runs/<name>/.saving/checkpoint-<step>, all ranks done writing.
        facts: what else the manifest holds (step, tokens, order version ...).
    Returns:
        The final folder, runs/<name>/checkpoint-<step>.
    """
    final = temporary.parent.parent / temporary.name
    files = sorted(p for p in temporary.rglob("*") if p.is_file())
    _make_readable(files)
    with ThreadPoolExecutor() as pool:  # hashing and fsync release the GIL
        sums = list(pool.map(_hash_and_flush, files))
    manifest = {
        **facts,
        "files": {
            str(p.relative_to(temporary)): {"num_bytes": p.stat().st_size, "sha256": digest}
            for p, digest in zip(files, sums, strict=True)
        },
    }
    write_json(temporary / MANIFEST, manifest)
    for folder in [temporary, *(p for p in temporary.rglob("*") if p.is_dir())]:
        flush_folder(folder)
    if final.exists():  # the same step again, after a rollback or a damaged file: the new one takes its place
        trash_checkpoint(final)
    os.rename(temporary, final)
    temporary.parent.rmdir()
    flush_folder(final.parent)
    return final


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None: every size and SHA-256 is compared with its manifest."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, facts in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["num_bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes instead of {facts['num_bytes']:,}"
    with ThreadPoolExecutor() as pool:
        for (name, facts), digest in zip(
            files.items(), pool.map(lambda n: sha256_of(checkpoint / n), files), strict=True
        ):
            if digest != facts["sha256"]:
                return f"{name} has changed since it was written (SHA-256)"
    return None


def newest_good_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, and one sentence for each that was skipped.

    Raises:
        UserError: there are checkpoints, and all are damaged: starting anew would overwrite them.
    """
    skipped = []
    for _, path in reversed(list_checkpoints(run)):
        damage = find_damage(path)
        if damage is None:
            return path, skipped
        skipped.append(f"{path}: {damage}. It is skipped.")
    if skipped:
        raise UserError(
            "\n".join(skipped)
            + f"\n{run}: no checkpoint is undamaged. Restore one from a copy, or start again with another "
            "training.run_name, or delete the damaged ones."
        )
    return None, []


def read_checkpoint_facts(checkpoint: Path) -> dict[str, Any]:
    """checkpoint.json of a complete checkpoint."""
    return json.loads((checkpoint / MANIFEST).read_text())


def rotate_checkpoints(run: Path, keep: int | None) -> None:
    """Delete the oldest complete checkpoints until `keep` are left, by step number; None keeps all."""
    if keep is not None:
        for _, path in list_checkpoints(run)[:-keep]:
            trash_checkpoint(path)


def trash_checkpoint(path: Path) -> None:
    """Delete a checkpoint so that a kill in between leaves no partial checkpoint-<step>."""
    trash = path.parent / f".trash-{path.name}"
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(path, trash)
    shutil.rmtree(trash, ignore_errors=True)


def clean_run_folder(run: Path) -> None:
    """Remove what a killed save or deletion left behind."""
    for path in [run / SAVING, *run.glob(".trash-*"), *run.glob(".final-*")]:
        shutil.rmtree(path, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON and flush it to disk."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """fsync a folder, so that the names in it survive a power cut; file systems that cannot are left alone."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def flush_files(folder: Path) -> None:
    """Make a folder's files readable as the umask says and flush them to disk."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    _make_readable(files)
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    flush_folder(folder)


def check_saved_weights(folder: Path, num_parameters: int) -> None:
    """Every parameter is in the saved files, none is empty (ZeRO stage 3 can write empty ones).

    Raises:
        RuntimeError: the number of saved weights is not the model's.
    """
    from safetensors import safe_open

    saved = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            names = weights.keys()
            saved += sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
    if saved != num_parameters:
        raise RuntimeError(f"{folder} holds {saved:,} weights but the model has {num_parameters:,}")


def raise_if_disk_full(error: Exception, path: Path, need_bytes: int) -> None:
    """Turn the many ways in which writers say ENOSPC into one sentence; other errors are left to the caller."""
    existing = next(p for p in path.absolute().parents if p.exists())
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # torch.save and safetensors drop errno: what they say instead, or a disk without room for what was being written
    texts = ("No space left", "Disk quota", "File too large", "unexpected pos", "file write failed", "iostream error")
    full = full or any(text in str(error) for text in texts)
    full = full or (isinstance(error, OSError | RuntimeError) and shutil.disk_usage(existing).free < need_bytes // 4)
    if full:
        raise UserError(
            f"{path}: cannot be written, the disk is full (or a quota or file size limit is reached). Complete "
            "checkpoints are untouched. Free space, lower training.save_total_limit or set RUNS_DIR to another disk, "
            "then type the same command: it continues from the newest checkpoint."
        ) from None


def _make_readable(files: list[Path]) -> None:
    """safetensors writes mode 0600; a team reads each other's checkpoints, so the user's umask decides."""
    mask = os.umask(0)
    os.umask(mask)
    for path in files:
        path.chmod(0o666 & ~mask)


def _hash_and_flush(path: Path) -> str:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
