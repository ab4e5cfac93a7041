"""Signs of life of the processes of a run, and the name of the one that others wait for in vain.

In: phase and step of this process. Out: runs/<name>/.ranks/<rank>.json, written every few seconds by a thread, so that
it goes on while the process waits for another; and, when the training fails because a process has ended or hangs, a
UserError that names it. On machines without a shared disk each sees the processes that share its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from clm.metrics import log
from data_prep.errors import UserError

FOLDER = ".ranks"
MISSED = 4  # beats: then a process is taken for ended or hanging


class Heartbeat(TrainerCallback):
    """While entered, this process shows that it lives. With one process nothing is written.

    Args:
        run: the run folder.
        rank: of this process.
        num_processes: of the launch.
        timeout_s: training.ddp_timeout: after a part of it a silent process is named in the log, since NCCL may abort
            this process instead of raising an error.
    """

    def __init__(self, run: Path, rank: int, num_processes: int, timeout_s: float):
        self.folder, self.rank, self.num_processes = run / FOLDER, rank, num_processes
        self.every_s = max(0.5, num_processes / 100)
        self.warn_after_s = max(MISSED * self.every_s, timeout_s / 4)
        self.phase, self.step = "loading", 0
        self._seen: dict[int, tuple[str, float]] = {}  # rank -> its newest content, and when it was new to us
        self._said: set[int] = set()
        self._ends = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> Heartbeat:
        if self.num_processes > 1:
            with contextlib.suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / f"{self.rank}.json").unlink(missing_ok=True)  # of an earlier start
            self._beat()
            threading.Thread(target=self._go_on, name="heartbeat", daemon=True).start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if self.num_processes == 1:
            return
        if error is None or isinstance(error, SystemExit):
            with contextlib.suppress(OSError), self._lock:
                self._ends.set()
                (self.folder / f"{self.rank}.json").unlink()
                self.folder.rmdir()  # the last one
            return
        self._show(f"failed: {error}" if isinstance(error, UserError) else "stopped by an error")
        if isinstance(error, Exception) and not isinstance(error, UserError):
            lost = self.find_lost()
            if lost is not None:
                self._end("failed")
                raise UserError(
                    f"{lost} The training cannot go on without it. Type the same command: it continues from "
                    "the newest checkpoint."
                ) from error

    # --- Trainer's events -------------------------------------------------------------------------------------------

    def on_step_begin(self, args, state, control, **kwargs):
        self.phase, self.step = "training", state.global_step + 1

    def on_step_end(self, args, state, control, **kwargs):
        self.phase = "evaluating or saving"

    def on_train_end(self, args, state, control, **kwargs):
        self.phase = "finishing"

    # --- the thread -------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        while not self._ends.wait(self.every_s):
            self._beat()
            for rank, silent_s in self._look().items():
                if silent_s > self.warn_after_s and rank not in self._said:
                    self._said.add(rank)
                    log.warning("%s", self._describe(rank, silent_s))

    def _beat(self) -> None:
        content = {"host": socket.gethostname(), "pid": os.getpid(), "phase": self.phase, "step": self.step}
        path = self.folder / f"{self.rank}.json"
        with contextlib.suppress(OSError), self._lock:
            if self._ends.is_set():
                return
            temporary = path.with_suffix(".new")
            temporary.write_text(json.dumps({**content, "at": time.time()}), encoding="utf-8")
            os.replace(temporary, path)

    def _show(self, phase: str) -> None:
        self.phase = phase
        self._beat()

    def _end(self, phase: str) -> None:
        self._show(phase)
        self._ends.set()

    def _look(self) -> dict[int, float]:
        """Rank -> seconds since its file was last seen to change, of the processes that should be living."""
        now, silent = time.monotonic(), {}
        for rank in range(self.num_processes):
            if rank == self.rank:
                continue
            try:
                content = (self.folder / f"{rank}.json").read_text(encoding="utf-8")
            except OSError:
                continue  # not started yet, on another disk, or over
            if rank not in self._seen or self._seen[rank][0] != content:
                self._seen[rank] = (content, now)
            silent[rank] = now - self._seen[rank][1]
        return silent

    # --- when the training fails ------------------------------------------------------------------------------------

    def find_lost(self) -> str | None:
        """Which process is the cause, in a sentence, or None: asked when this one's communication has failed."""
        until = time.monotonic() + MISSED * self.every_s
        while time.monotonic() < until:
            self._look()
            time.sleep(self.every_s / 2)
        silent = self._look()
        facts = {rank: json.loads(self._seen[rank][0]) for rank in silent}
        for rank, fact in facts.items():
            if fact["phase"].startswith("failed: "):
                return f"process {rank} on {fact['host']} has ended: {fact['phase'].removeprefix('failed: ')}"
        dead = [rank for rank, s in silent.items() if s >= (MISSED - 1) * self.every_s and _may_be_cause(facts[rank])]
        return self._describe(dead[0], silent[dead[0]]) if dead else None

    def _describe(self, rank: int, silent_s: float) -> str:
        fact = json.loads(self._seen[rank][0])
        return (
            f"process {rank} on {fact['host']} (pid {fact['pid']}) has given no sign of life for {silent_s:.0f} s: it "
            f"was killed, or it or its machine hangs. It was {fact['phase']}, step {fact['step']:,}."
        )


def _may_be_cause(fact: dict[str, Any]) -> bool:
    """Not one that was stopped by the loss of another itself and has ended since."""
    return fact["phase"] != "stopped by an error"
