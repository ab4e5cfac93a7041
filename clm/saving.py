"""Saving while training goes on: who copies, writes, hashes and publishes a checkpoint, and what happens when it fails.

At a save all ranks of a run call `Saver.save`. What the checkpoint holds is copied to host memory, and a thread of the
rank's own writes it into `.saving/checkpoint-<step>`, hashes it and leaves a marker with its hashes there. One rank for
each disk, the publisher, writes model and optimizer, waits for the markers of all ranks that share its disk by looking
into the folder (never by a collective, which would meet those of the training), and publishes the checkpoint.

One checkpoint is in the making at a time: the next save waits for it. Without the memory for a copy, or where the
recipe says so, the same is done while training waits. With FSDP2 and tensor parallelism each rank writes its shards
(clm/sharded.py) in the same way. DeepSpeed writes its own files, while training waits.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from transformers import Trainer

from clm.checkpoint import (
    SAVING,
    Files,
    PartError,
    describe_failure,
    explain_failure,
    free_bytes,
    hash_files,
    is_disk_full,
    publish,
    total_bytes,
    user_mask,
    write_json,
)
from clm.contents import checkpoint_facts, collect, own_files, write_files, write_texts
from clm.disks import choose_publisher, find_ranks_of_disk
from clm.metrics import log
from clm.push import push_checkpoint
from clm.retention import apply_retention
from clm.run_folder import PREFIX
from clm.run_record import RECORD, write_record
from clm.sharded import ShardWriter, num_local_bytes
from clm.snapshot import Buffers, copy_to_host, find_lack_of_memory, num_bytes_to_copy
from data_prep.errors import UserError
from data_prep.sizes import format_bytes

if TYPE_CHECKING:
    from clm.trainer import ClmTrainer

MARKER_WAIT_S = 900  # all ranks begin to write at one step, so their parts differ by no more than a slow disk
RETRY_S = 60  # with run.full_disk: pause
GRACE_S = 10  # when the training fails, for the parts of other ranks: those that live have begun to write theirs


class Saver:
    """Writes the checkpoints of one training. Every rank has one and calls it at the same steps."""

    def __init__(self, trainer: ClmTrainer):
        self.trainer = trainer
        self.run: Path = trainer.plan.run_folder
        self.settings = trainer.plan.recipe.run
        self.rank = trainer.args.process_index
        self.ranks = find_ranks_of_disk(self.run, self.rank, trainer.args.world_size)
        self.publisher = choose_publisher(self.run, self.ranks, trainer.args.should_save)
        self.is_publisher = self.rank == self.publisher
        self.num_bytes: int = trainer.plan.checkpoint_bytes  # of a checkpoint: an estimate until one was written
        self.is_engine_writing = False
        self.shards = ShardWriter(trainer, self.ranks)
        self._tokenizer = copy.deepcopy(trainer.processing_class)  # the thread's own
        self._buffers: Buffers = {}
        self._thread: threading.Thread | None = None
        self._folder: Path | None = None  # of the newest save
        self._failure: tuple[int, Exception] | None = None  # step and error of the newest save, if it failed
        self._has_said_why = False
        self._ends_at: float | None = None  # set when the training fails: nothing is waited for any longer than that
        user_mask()  # asked now, before there is a second thread
        # Stock lets only global rank 0 write weights, also with save_on_each_node: the other nodes would have none.
        trainer.model.should_save_on_this_rank = lambda is_main: is_main and self.is_publisher
        if self.is_publisher and self.rank != 0 and not (self.run / RECORD).is_file():
            write_record(trainer.plan)  # on another node's disk; rank 0 has written its own

    # --- called by the training -------------------------------------------------------------------------------------

    def save(self, model: Any, trial: Any) -> None:
        """Save the present step: returns when its state is copied, or written where it cannot be copied.

        Raises:
            UserError: the disk is full and the recipe says run.full_disk: stop.
        """
        self.wait()
        self.stop_if_full()
        started_at = time.perf_counter()
        trainer = self.trainer
        folder = self._folder = self.run / SAVING / f"{PREFIX}{trainer.state.global_step}"
        with contextlib.suppress(OSError):  # a disk that cannot take even this shows when the files are written
            folder.mkdir(parents=True, exist_ok=True)
        trainer.store_flos()
        facts = checkpoint_facts(trainer)  # a collective: after it every rank finds the folder
        if trainer.is_deepspeed_enabled:
            self._say_once("DeepSpeed writes its own files")
            self._save_by_engine(model, trial, folder, facts, started_at)
            return
        state, shards = collect(trainer, self.is_publisher), self.shards.collect()
        reason = self._why_training_waits(state, shards)
        if reason is not None:
            self._say_once(reason)
            self.shards.take(shards)
            self._write_and_publish(folder, state, facts, started_at)
            return
        self.shards.start(shards, folder)
        state = copy_to_host(state, self._buffers)
        stopped_s = time.perf_counter() - started_at
        task = (folder, state, facts, started_at, stopped_s)
        self._thread = threading.Thread(target=self._write_and_publish, args=task, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing of an earlier save is being written by this rank: for a publisher, until it is published.

        A rank waits for another's publisher at the next collective of the training, where one that has died shows.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def abandon(self) -> None:
        """The training has failed, perhaps because another rank died: complete what still can be completed."""
        self._ends_at = time.monotonic() + GRACE_S
        self.wait()

    def finish(self) -> None:
        """Wait for the checkpoint in the making.

        Raises:
            UserError: the checkpoint of the step at which training ended could not be written.
        """
        self.wait()
        if self._failure is not None and self._failure[0] == self.trainer.state.global_step:
            raise self._explain(self._failure[1])

    def stop_if_full(self) -> None:
        """With run.full_disk: stop, end the run after a save that did not fit."""
        if self._failure is not None and self.settings.full_disk == "stop" and self._is_disk_full(self._failure[1]):
            raise self._explain(self._failure[1])

    def clean_up(self, step: int, is_finished: bool = False) -> None:
        """Apply run.retention on this disk; that it fails is no reason to stop a training."""
        if self.is_publisher:
            try:
                apply_retention(self.run, self.settings.retention, step, is_finished)
            except (OSError, UserError) as error:
                log.warning("Older checkpoints could not all be reduced or deleted, training goes on: %s", error)

    # --- writing: on the thread, or while training waits --------------------------------------------------------------

    def _write_and_publish(
        self,
        folder: Path,
        state: dict[str, Any],
        facts: dict[str, Any],
        started_at: float,
        stopped_s: float | None = None,
    ) -> None:
        """A whole save from the collected state on; what goes wrong is reported and remembered, never raised."""

        def write() -> None:
            self.write(folder, state)
            self._complete(folder, facts)

        try:
            self._until_it_fits(write, folder)
        except Exception as error:
            self._give_up(folder, facts["step"], error)
        else:
            self._after_publishing(folder, facts, started_at, stopped_s)

    def write(self, folder: Path, state: dict[str, Any]) -> None:
        """Write this rank's files."""
        if self.is_publisher:
            folder.mkdir(parents=True, exist_ok=True)
        self.shards.finish(folder)
        write_files(folder, state, self.trainer.model, self._tokenizer, self.run / RECORD)

    def hash_own_files(self, folder: Path) -> Files:
        """Flush and hash what this rank has written."""
        return hash_files(folder, own_files(folder, self.rank, self.publisher))

    def _complete(self, folder: Path, facts: dict[str, Any]) -> None:
        """Hash this rank's files and say so; the publisher waits for its disk's ranks and makes it a checkpoint."""
        files = self.hash_own_files(folder)
        if not self.is_publisher:
            write_json(folder / f".rank-{self.rank}", {"files": files})
            return
        others = [rank for rank in self.ranks if rank != self.rank]
        for rank in others:
            files |= self._await_marker(folder / f".rank-{rank}", rank)
        for rank in others:
            (folder / f".rank-{rank}").unlink()
        files = self.shards.join(folder, files)
        publish(folder, self.run / folder.name, facts, dict(sorted(files.items())))
        self.num_bytes = total_bytes(files)

    def _await_marker(self, marker: Path, rank: int) -> Files:
        deadline = time.monotonic() + MARKER_WAIT_S
        while not marker.exists():
            if self._ends_at is not None and time.monotonic() > self._ends_at:
                raise TimeoutError(f"process {rank} has ended without writing its part")
            if time.monotonic() > deadline and self.settings.full_disk != "pause":
                raise TimeoutError(f"process {rank} has not written its part within {MARKER_WAIT_S} s")
            time.sleep(0.02)
        content = json.loads(marker.read_text(encoding="utf-8"))
        if "error" in content:
            raise PartError(rank, content["error"])
        return content["files"]

    def _after_publishing(
        self, folder: Path, facts: dict[str, Any], started_at: float, stopped_s: float | None
    ) -> None:
        self._failure = None
        if not self.is_publisher:
            return
        all_s = time.perf_counter() - started_at
        log.info(
            "saved %s: %s in %.2f s, training waited %.2f s",
            folder.name,
            format_bytes(self.num_bytes),
            all_s,
            all_s if stopped_s is None else stopped_s,
        )
        self.clean_up(facts["step"])
        if self.trainer.args.push_to_hub and self.trainer.is_world_process_zero():
            push_checkpoint(self.trainer, self.run / folder.name, facts)

    # --- DeepSpeed: its calls are collective, so all ranks write at once, and training waits --------------------------

    def write_by_engine(self, model: Any, trial: Any, folder: Path) -> None:
        """Stock's writing with DeepSpeed's own calls."""
        self.is_engine_writing = True
        try:
            Trainer._save_checkpoint(self.trainer, model, trial)
        finally:
            self.is_engine_writing = False
        if self.is_publisher:
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
            write_texts(folder, self.run / RECORD)
        self.trainer.accelerator.wait_for_everyone()

    def _save_by_engine(self, model: Any, trial: Any, folder: Path, facts: dict[str, Any], started_at: float) -> None:
        while not self._engine_has_room():
            if self.settings.full_disk != "pause":
                self._give_up(folder, facts["step"], OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
                return
            self._wait_for_room(folder)
        try:
            self.write_by_engine(model, trial, folder)
            self._complete(folder, facts)
        except Exception as error:  # the other ranks are somewhere in the engine's collectives: there is no way back
            self._discard(folder)
            raise self._explain(error) from error
        self.trainer.accelerator.wait_for_everyone()
        self._after_publishing(folder, facts, started_at, None)

    def _engine_has_room(self) -> bool:
        """Looked up before the engine begins, and the same on all ranks."""
        free, need = zip(*gather_object([(free_bytes(self.run), self.num_bytes)]), strict=True)
        return min(free) >= max(need)

    # --- when it fails ----------------------------------------------------------------------------------------------

    def _until_it_fits(self, write: Callable[[], None], folder: Path) -> None:
        """Call `write`; with run.full_disk: pause, again and again until there is room."""
        while True:
            try:
                return write()
            except Exception as error:
                if self.settings.full_disk != "pause" or not self._is_disk_full(error) or self._ends_at is not None:
                    raise
            for name in own_files(folder, self.rank, self.publisher):
                (folder / name).unlink(missing_ok=True)
            self._wait_for_room(folder)

    def _wait_for_room(self, folder: Path) -> None:
        free = free_bytes(self.run)
        log.warning(
            "%s waits for room on the disk: it needs %s, %s are free. Training goes on until the next save.",
            *(folder.name, format_bytes(self.num_bytes), format_bytes(free)),
        )
        is_quota = free >= self.num_bytes  # then the free space says nothing
        until = time.monotonic() + RETRY_S
        while time.monotonic() < until and (is_quota or free_bytes(self.run) < self.num_bytes):
            time.sleep(0.5)

    def _give_up(self, folder: Path, step: int, error: Exception) -> None:
        what, is_of_disk = f"{type(error).__name__}: {error}", isinstance(error, OSError | RuntimeError)
        if self.trainer.args.world_size > 1 and is_of_disk and not isinstance(error, PartError):
            error = PartError(self.rank, what)
        self._failure = (step, error)
        log.warning(
            "%s was not saved: %s. Complete ones are untouched; training goes on, and the next save tries again.",
            folder.name,
            describe_failure(error, self.run, self.num_bytes),
        )
        if self.is_publisher:
            self._discard(folder)
            return
        with contextlib.suppress(OSError):
            for name in own_files(folder, self.rank, self.publisher):  # else a full disk has no room for the marker
                (folder / name).unlink()
            write_json(folder / f".rank-{self.rank}", {"error": what})

    def _discard(self, folder: Path) -> None:
        """Remove what was written; renamed first, so that a rank that still writes adds nothing to it."""
        gone = folder.with_name(f".failed-{folder.name}")
        with contextlib.suppress(OSError):
            os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()

    def _is_disk_full(self, error: Exception) -> bool:
        return is_disk_full(error, self.run, self.num_bytes)

    def _explain(self, error: Exception) -> Exception:
        return explain_failure(error, self.run / self._folder.name, self.num_bytes)

    # --- in the background? -----------------------------------------------------------------------------------------

    def _why_training_waits(self, state: dict[str, Any], shards: dict[str, Any]) -> str | None:
        if not self.settings.save_in_background:
            return "run.save_in_background is false"
        if "wandb" in self.trainer.args.report_to and os.environ.get("WANDB_LOG_MODEL") == "checkpoint":
            return "WANDB_LOG_MODEL is checkpoint, and W&B takes it as soon as it is saved"
        if self._buffers:
            return None
        return find_lack_of_memory(num_bytes_to_copy(state) + num_local_bytes(shards))

    def _say_once(self, reason: str) -> None:
        if not self._has_said_why:
            self._has_said_why = True
            log.info("Training waits while a checkpoint is written: %s.", reason)
