"""Before step 1: can this run save? A checkpoint of full size is really written, timed, read again and removed.

In: a trainer that has not made a step. Out: runs/<name>/preflight.json and one line in the log, or a UserError while
nothing is lost yet. Once per run folder.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

from clm.checkpoint import SAVING, explain_failure, find_changed, free_bytes, total_bytes, write_json
from clm.contents import collect
from clm.metrics import log
from clm.retention import count_kept
from clm.run_folder import PREFIX
from clm.sharded import SHARDED
from data_prep.errors import UserError
from data_prep.sizes import format_bytes

if TYPE_CHECKING:
    from clm.saving import Saver

RESULT = "preflight.json"
_PIECE = 2**24


def run_preflight(saver: Saver, model: Any) -> None:
    """Write, verify and remove a checkpoint, and compare what the run will keep with the free space. A collective.

    Raises:
        UserError: it cannot be written, does not read back as written, or the disk is too small for what the run keeps.
    """
    if any(gather_object([(saver.run / RESULT).is_file()])):
        return
    folder = saver.run / SAVING / f"{PREFIX}0"  # never published: it gets no manifest
    with contextlib.suppress(OSError):  # said below, when files are written
        folder.mkdir(parents=True, exist_ok=True)
    gather_object([saver.rank])  # every rank finds the folder
    measured, failure = (0, 0.0, 0.0), None
    try:
        measured = _write_and_verify(saver, model, folder)
    except Exception as error:
        failure = explain_failure(error, folder, saver.num_bytes)
        if saver.trainer.is_deepspeed_enabled or not isinstance(failure, UserError):
            # the others are in the engine's collectives, or it is an error of ours
            shutil.rmtree(folder.parent, ignore_errors=True)
            raise failure from error
    _raise_together(failure, folder)
    ours = [one for rank, one in enumerate(gather_object([measured])) if rank in saver.ranks]
    num_bytes, write_s, verify_s = sum(o[0] for o in ours), max(o[1] for o in ours), max(o[2] for o in ours)
    saver.num_bytes = num_bytes
    if saver.is_publisher:
        shutil.rmtree(folder.parent, ignore_errors=True)  # all ranks have read their part
        result = {"num_bytes": num_bytes, "write_s": write_s, "verify_s": verify_s, **_check_room(saver, num_bytes)}
        write_json(saver.run / RESULT, result)
        log.info(
            "preflight: a checkpoint of %s takes %.2f s to write, %.2f s to verify; %s of them%s and final/ fit: %s of "
            "%s free",
            format_bytes(num_bytes),
            write_s,
            verify_s,
            result["num_checkpoints"],
            f", {result['num_weights']} of weights only" if result["num_weights"] else "",
            format_bytes(result["need_bytes"]),
            format_bytes(result["free_bytes"]),
        )
    gather_object([saver.rank])  # no step before everyone knows


def _raise_together(failure: Exception | None, folder: Path) -> None:
    """Where one process cannot write, all end, and each says which one it is. A collective."""
    failures = gather_object([None if failure is None else str(failure)])
    rank = next((rank for rank, text in enumerate(failures) if text is not None), None)
    if rank is not None:
        shutil.rmtree(folder.parent, ignore_errors=True)
        raise UserError(failures[rank] if len(failures) == 1 else f"process {rank}: {failures[rank]}")


def _write_and_verify(saver: Saver, model: Any, folder: Path) -> tuple[int, float, float]:
    """Bytes that this rank wrote, and the seconds for writing and for reading them again."""
    started_at = time.perf_counter()
    if saver.trainer.is_deepspeed_enabled:
        saver.write_by_engine(model, None, folder)  # the engine's optimizer state is there from the beginning
    else:
        saver.shards.take(saver.shards.collect())
        saver.write(folder, collect(saver.trainer, saver.is_publisher))
        plan = saver.trainer.plan
        if saver.shards.is_used:
            share = plan.optimizer_bytes // len(saver.ranks)
            _write_ballast(folder / f"ballast-{saver.rank}", share, [*folder.glob(f"{SHARDED}/__{saver.rank}_*")])
        elif saver.is_publisher:
            _write_ballast(folder / "ballast", plan.optimizer_bytes, [*folder.glob("*.safetensors")])
    files = saver.hash_own_files(folder)
    write_s = time.perf_counter() - started_at
    started_at = time.perf_counter()
    for name in files:
        _forget(folder / name)
    damage = find_changed(folder, files)
    if damage is not None:
        raise UserError(
            f"{folder}: {damage} right after it was written. No checkpoint on this disk could be trusted. Set RUNS_DIR "
            "to another disk."
        )
    return total_bytes(files), write_s, time.perf_counter() - started_at


def _write_ballast(path: Path, num_bytes: int, sources: list[Path]) -> None:
    """In place of the optimizer's state, which the first step makes: as many bytes of the model's weights."""
    written = 0
    if not any(source.stat().st_size for source in sources):
        return  # a replica of HSDP, which writes nothing
    with open(path, "wb") as ballast:
        for source in itertools.cycle(sources):
            with open(source, "rb") as weights:
                while piece := weights.read(min(num_bytes - written, _PIECE)):
                    written += ballast.write(piece)
            if written >= num_bytes:
                break


def _forget(path: Path) -> None:
    """Drop a file from the page cache, so that it is read from the disk."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _check_room(saver: Saver, num_bytes: int) -> dict[str, Any]:
    """How much the run will hold at most, and what is free."""
    trainer, plan = saver.trainer, saver.trainer.plan
    weights_bytes = plan.weights_bytes
    num_saves = math.ceil(trainer.state.max_steps / trainer.state.save_steps) + len(plan.timeline.stages) - 1
    num_full, num_weights = count_kept(saver.settings.retention, num_saves, plan.timeline.num_tokens)
    need = (num_full + 1) * num_bytes + (num_weights + 1) * weights_bytes
    free = free_bytes(saver.run)
    if free < need:
        weights = f", {num_weights} of weights only ({format_bytes(weights_bytes)} each)" if num_weights else ""
        raise UserError(
            f"{saver.run}: run.retention keeps up to {num_full} checkpoints of {format_bytes(num_bytes)}{weights}, and "
            f"with one in the making and final/ that is {format_bytes(need)}, but {format_bytes(free)} are free. The "
            "disk would be full before the run ends. Free space, lower run.retention.last, best or weights, raise "
            "every_tokens or training.save_steps, set RUNS_DIR to another disk, or try anyway with run.preflight=false."
        )
    return {"num_checkpoints": num_full + 1, "num_weights": num_weights, "need_bytes": need, "free_bytes": free}
