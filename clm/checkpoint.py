"""Checkpoints on disk: complete or absent, and checked before they are used.

A checkpoint is written as `.saving/checkpoint-<step>`, gets `checkpoint.json` (step, tokens, sizes and SHA-256 of every
file) when all else is on the disk, and is renamed to `checkpoint-<step>`: a folder of that name is complete, always.
`weights-<step>`, with `weights.json`, is the same for a checkpoint that was reduced to its weights.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from clm.events import read_events
from clm.run_folder import MANIFEST, PREFIX
from data_prep.errors import UserError
from data_prep.manifest import sha256_of
from data_prep.sizes import format_bytes

SAVING = ".saving"
UNSHARDED = ".unsharded"  # models made of sharded checkpoints (clm/unshard.py)
# What only a resume needs, as globs; the rest of a checkpoint is a model in Hub format, its recipe and environment.
RESUME_ONLY = ("optimizer*", "training_weights*", "scheduler*", "scaler*", "rng_state*", "trainer_state.json", MANIFEST)
RESUME_ONLY += ("global_step*/*", "latest", "latest_universal", "zero_to_fp32.py")  # DeepSpeed's
RESUME_ONLY += ("sharded/*",)  # FSDP2's

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk itself, a quota, a limit of the file's size

Files = dict[str, dict[str, Any]]  # path within the folder -> {"num_bytes": ..., "sha256": ...}


def hash_files(folder: Path, names: list[str]) -> Files:
    """Make files readable as the umask says, flush them to disk, and take their sizes and SHA-256."""

    def finish(name: str) -> dict[str, Any]:
        path = folder / name
        path.chmod(0o666 & ~user_mask())
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"num_bytes": path.stat().st_size, "sha256": digest}

    with ThreadPoolExecutor(2) as pool:  # hashing and fsync release the GIL
        return dict(zip(names, pool.map(finish, names), strict=True))


def publish(temporary: Path, final: Path, facts: dict[str, Any], files: Files, manifest: str = MANIFEST) -> None:
    """Make a folder whose files are on the disk a complete one: manifest, flush, rename.

    Args:
        temporary: where it was written, on the same file system.
        final: checkpoint-<step> or weights-<step>; one of that name (of a time before a rollback) is replaced.
        facts: what else the manifest holds (step, tokens, order version ...).
        files: all of its files.
        manifest: name of the manifest.
    """
    content = {**facts, "files": files}
    write_json(temporary / manifest, {**content, "sha256": _sha256_of_json(content)})
    for folder in [temporary, *(p for p in temporary.rglob("*") if p.is_dir())]:
        flush_folder(folder)
    if final.exists():
        trash(final)
    os.rename(temporary, final)
    with contextlib.suppress(OSError):  # another rank may be in there already
        temporary.parent.rmdir()
    flush_folder(final.parent)


def find_damage(checkpoint: Path, with_checksums: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None: its files are compared with its manifest."""
    try:
        facts = read_checkpoint_facts(checkpoint)
        if facts.pop("sha256") != _sha256_of_json(facts):
            return f"{MANIFEST} has changed since it was written (SHA-256)"
        return find_changed(checkpoint, facts["files"], with_checksums)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"


def find_changed(folder: Path, files: Files, with_checksums: bool = True) -> str | None:
    """The first file that is not as it was: missing, of another size or, if asked for, of another SHA-256."""
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["num_bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes instead of {facts['num_bytes']:,}"
    if with_checksums:
        with ThreadPoolExecutor() as pool:
            sums = pool.map(lambda name: sha256_of(folder / name), files)
            for (name, facts), digest in zip(files.items(), sums, strict=True):
                if digest != facts["sha256"]:
                    return f"{name} has changed since it was written (SHA-256)"
    return None


def _sha256_of_json(value: Any) -> str:
    """The same before and after a round through a file."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(value)), sort_keys=True).encode()).hexdigest()


def read_checkpoint_facts(checkpoint: Path, manifest: str = MANIFEST) -> dict[str, Any]:
    """checkpoint.json of a complete checkpoint, or weights.json."""
    return json.loads((checkpoint / manifest).read_text(encoding="utf-8"))


def rolled_back_at(run: Path, facts: dict[str, Any]) -> int | None:
    """The first bad step of a rollback that a checkpoint lies behind and knows nothing of: it trained on what the run
    has excluded since. None for one that may be used."""
    known = {tuple(item) for item in facts.get("excluded", [])}
    for event in read_events(run):
        if event["event"] != "rollback" or facts["step"] < event["step"]:
            continue
        if not {tuple(item) for item in event["excluded"]} <= known:
            return event["step"]
    return None


def total_bytes(files: Files) -> int:
    """The size of a checkpoint."""
    return sum(file["num_bytes"] for file in files.values())


def trash(path: Path) -> None:
    """Delete a folder so that a kill in between leaves nothing partial under its name."""
    gone = path.parent / f".trash-{path.name}"
    shutil.rmtree(gone, ignore_errors=True)
    shutil.rmtree(path.parent / UNSHARDED / path.name, ignore_errors=True)
    os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def clean_run_folder(run: Path) -> None:
    """Remove what a killed save or deletion left behind; a checkpoint that only lacked its rename gets it."""
    for path in (run / SAVING).glob(f"{PREFIX}*"):
        if (path / MANIFEST).is_file() and not (run / path.name).exists():
            os.rename(path, run / path.name)  # checkpoint.json is written last; its checksums are compared before use
    for path in [run / SAVING, *run.glob(".trash-*"), *run.glob(".final-*")]:
        shutil.rmtree(path, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON by rename and flush it to disk."""
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        path.chmod(0o666 & ~user_mask())
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    flush_folder(folder)


@functools.cache
def user_mask() -> int:
    """The umask: safetensors writes mode 0600, but a team reads each other's checkpoints. Asking for it sets it for a
    moment, so it is asked once."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


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


def free_bytes(path: Path) -> int:
    """Room on the disk of a path that need not exist yet."""
    return shutil.disk_usage(next(p for p in (path, *path.absolute().parents) if p.exists())).free


def is_disk_full(error: BaseException, path: Path, need_bytes: int) -> bool:
    """Whether a failed write means that the disk (or a quota, or a file size limit) is full.

    torch.save and safetensors drop errno: then what they say decides, or a disk that has no room for what was written.
    """
    texts = ("No space left", "Disk quota", "File too large", "unexpected pos", "file write failed", "iostream error")
    return (
        getattr(error, "errno", None) in FULL_DISK
        or any(text in str(error) for text in texts)
        or (isinstance(error, OSError | RuntimeError) and free_bytes(path) < need_bytes // 4)
    )


class PartError(OSError):
    """A process of several could not write its part of a checkpoint."""

    def __init__(self, rank: int, what: str):
        super().__init__(f"process {rank}: {what}")
        self.rank = rank


def describe_failure(error: Exception, path: Path, need_bytes: int) -> str:
    """Why a checkpoint was not written, for the log of a training that goes on."""
    if is_disk_full(error, path, need_bytes):
        return _describe_full(error, path, need_bytes)
    return str(error) if isinstance(error, PartError) else f"{type(error).__name__}: {error}"


def _describe_full(error: Exception, path: Path, need_bytes: int) -> str:
    who = f"process {error.rank}: " if isinstance(error, PartError) else ""
    return (
        f"{who}the disk is full (or a quota or file size limit is reached): it needs {format_bytes(need_bytes)}, "
        f"{format_bytes(free_bytes(path))} are free"
    )


def explain_failure(error: Exception, path: Path, need_bytes: int) -> Exception:
    """What a user is told when a checkpoint or final/ cannot be written; an error that no user can mend is itself."""
    if is_disk_full(error, path, need_bytes):
        return UserError(
            f"{path}: cannot be written, {_describe_full(error, path, need_bytes)}. Complete checkpoints are "
            "untouched. Free space, lower run.retention.last or set RUNS_DIR to another disk, then type the same "
            "command: it continues from the newest checkpoint."
        )
    if isinstance(error, OSError):
        return UserError(
            f"{path}: cannot be written ({error}). Complete checkpoints are untouched. Mend it, then type the same "
            "command: it continues from the newest checkpoint."
        )
    return error
