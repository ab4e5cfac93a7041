"""Stop and save on request: signals at any rank, and the files SAVE and STOP in the run folder.

In: SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 (Slurm's warning) at any process, or `touch runs/<name>/SAVE` or `STOP`.
Out: all ranks save at the same step and, but for SAVE, stop there.

    signal -> thread of SignalWatch -> a number -> all_reduce(MAX) over gloo, posted at the end of step k
           -> read at the end of step k+1 by all ranks -> should_save, should_training_stop -> Requests.leave()

With one process there is nothing to agree on: the request is followed at the end of the step in which it came.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from clm.metrics import log
from data_prep.lock import let_go_of_inherited_locks

if TYPE_CHECKING:
    from clm.trainer import ClmTrainer

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: saved, not finished, start it again
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
URGENT = (signal.SIGTERM, signal.SIGINT)  # the second of these exits at once; SIGUSR1 only ever asks

# Launchers, `timeout` and Slurm send a signal to the whole process group and forward it too: copies count as one.
COPIES_S = 2.0
LOOK_S = 1.0  # between two looks at the files

# Requests as numbers: the largest of all ranks counts. A signal is FIRST_SIGNAL + its number.
NOTHING, SAVE, STOP, FIRST_SIGNAL = 0, 1, 2, 100
FILES = {SAVE: "SAVE", STOP: "STOP"}
LOADING, TRAINING, FINISHING, LEAVING = range(4)


class Stopped(SystemExit):
    """The run was saved and stopped on request; `code` is the process's exit code."""


class SignalWatch:
    """While entered, SIGTERM, SIGINT and SIGUSR1 are requests: `request` is the first one's number.

    A thread reads them, not Python's handlers: those run only when the main thread is back in Python, which a main
    thread that waits for a dead peer in NCCL never is; and then a second signal has to work.

    Args:
        says: whether this process tells the user; one of all ranks does.
    """

    def __init__(self, says: bool):
        self.says = says
        self.phase = LOADING
        self.request = NOTHING
        self._urgent_at: float | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._read_end, self._write_end = os.pipe()
            os.set_blocking(self._write_end, False)
            threading.Thread(target=self._listen, name="signals", daemon=True).start()
            self._fd_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
            for number in SIGNALS:
                self._before[number] = signal.signal(number, lambda *_: None)
                signal.siginterrupt(number, False)  # system calls of libraries go on instead of failing with EINTR
            _follow_launcher()
        return self

    def __exit__(self, *error: object) -> None:
        if not self._before or self.phase == LEAVING:
            return  # leaving: a launcher that sees one rank end sends SIGTERM to the others, which end anyway
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        os.write(self._write_end, b"\0")  # ends the thread
        os.close(self._write_end)

    def _listen(self) -> None:
        while numbers := os.read(self._read_end, 64):
            for number in numbers:
                if number in SIGNALS:
                    self._receive(signal.Signals(number))
            if 0 in numbers:
                break
        os.close(self._read_end)

    def _receive(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.phase == LOADING:
            self._exit(number, "before the first step: there is nothing to save, stopped at once")
        is_copy = self._urgent_at is not None and now - self._urgent_at < COPIES_S
        if self.phase == LEAVING or (number in URGENT and is_copy) or (number not in URGENT and self.request):
            return
        if number in URGENT:
            if self._urgent_at is not None:
                self._exit(number, "a second signal: stopped at once, what was not saved yet is lost")
            self._urgent_at = now
        self.request = self.request or FIRST_SIGNAL + number
        if self.says:
            what = "saving at the end of this step, then stopping"
            if self.phase == FINISHING:
                what = "the last step is done, the run finishes"
            log.warning("%s: %s; another one after %g s stops at once", number.name, what, COPIES_S)

    def _exit(self, number: signal.Signals, why: str) -> NoReturn:
        if self.says:
            os.write(2, f"{number.name} {why}\n".encode())
        os._exit(128 + number)


class Requests(TrainerCallback):
    """Follows signals and the files SAVE and STOP, at the same step on all ranks.

    Replaces Trainer's enable_jit_checkpoint, which knows SIGTERM only, decides on each rank alone (with two ranks and a
    signal to one it hangs) and may save in the middle of a step.

    Args:
        run: the run folder.
        rank: of this process, among all.
    """

    def __init__(self, run: Path, rank: int):
        self.run = run
        self.is_main = rank == 0
        self.watch = SignalWatch(says=self.is_main)
        self.trainer: ClmTrainer | None = None
        self.heartbeat: TrainerCallback | None = None
        self._agreed = NOTHING
        self._group: dist.ProcessGroup | None = None
        self._number = torch.zeros(1, dtype=torch.int64)
        self._posted: dist.Work | None = None
        self._looked_at = 0.0

    def __enter__(self) -> Requests:
        for path in self._remove_files():
            print(f"{path}: was there before this start, removed", flush=True)
        self.watch.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.watch.__exit__(*error)

    def follow(self, trainer: ClmTrainer) -> None:
        """Take part in a training. Before the watch for spikes does: it judges what is about to be saved."""
        self.trainer = trainer
        trainer.add_callback(self)
        if self.heartbeat is not None:
            trainer.add_callback(self.heartbeat)

    # --- Trainer's events -------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        if args.world_size > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=args.ddp_timeout))

    def on_step_begin(self, args, state, control, **kwargs):
        self.watch.phase = TRAINING

    def on_step_end(self, args, state, control, **kwargs):
        self._agreed = self._agree()
        if state.global_step >= state.max_steps:
            self.watch.phase = FINISHING  # it is saved anyway
            return
        if self._agreed == NOTHING:
            return
        control.should_save = True
        if self._agreed > SAVE:
            control.should_training_stop = True
            self.trainer.outcome = "stopped"
        if self.is_main and not self.watch.request:
            then = "then stopping" if self._agreed > SAVE else "training goes on"
            log.info("%s: saving at step %s, %s", self._what(), f"{state.global_step:,}", then)

    def on_save(self, args, state, control, **kwargs):
        if self._agreed != NOTHING:
            self._remove_files()  # only now: a kill during the save leaves the request

    def on_train_end(self, args, state, control, **kwargs):
        self._take_posted()
        if self.trainer.outcome == "finished":
            self._remove_files()
        self.trainer = None  # of a stage that is over: the next model needs its memory

    # --- agreement --------------------------------------------------------------------------------------------------

    def _agree(self) -> int:
        """The largest request of all ranks one step ago; then ask again. Waits for the other hosts, never for a GPU."""
        if self._group is None:
            return self._own_request(look=True)
        agreed = self._take_posted()
        if agreed <= SAVE:
            self._number[0] = self._own_request(look=agreed == NOTHING)
            self._posted = dist.all_reduce(self._number, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def _take_posted(self) -> int:
        if self._posted is None:
            return NOTHING
        self._posted.wait()
        self._posted = None
        return int(self._number[0])

    def _own_request(self, look: bool) -> int:
        if self.watch.request:
            return self.watch.request
        now = time.monotonic()
        if not (look and self.is_main and now - self._looked_at >= LOOK_S):
            return NOTHING
        self._looked_at = now
        return max((request for request, name in FILES.items() if os.path.exists(self.run / name)), default=NOTHING)

    def _remove_files(self) -> list[Path]:
        paths = [self.run / name for name in FILES.values() if self.is_main and os.path.exists(self.run / name)]
        for path in paths:
            path.unlink(missing_ok=True)
        return paths

    def _what(self) -> str:
        if self._agreed in FILES:
            return str(self.run / FILES[self._agreed])
        return signal.Signals(self._agreed - FIRST_SIGNAL).name

    # --- the end ----------------------------------------------------------------------------------------------------

    def leave(self, trainer: ClmTrainer) -> NoReturn:
        """End a run that stopped; its checkpoint is on the disk, or this rank's training would have failed.

        Raises:
            Stopped: with exit code 75 after a signal, 0 after STOP.
        """
        code, state = (0 if self._agreed == STOP else EXIT_STOPPED), trainer.state
        if self.is_main:
            _close_loggers()
            log.info(
                "%s: saved at step %s of %s and stopped; the same command continues.",
                self._what(),
                f"{state.global_step:,}",
                f"{state.max_steps:,}",
            )
        for stream in (sys.stdout, sys.stderr, *log.handlers):
            stream.flush()
        if self._group is not None:  # nobody ends, and makes the launcher end the others, before all are done
            try:
                dist.all_reduce(self._number, group=self._group)
            except RuntimeError:
                code = 2  # another rank could not save, has said why, and is gone
        self.watch.phase = LEAVING
        raise Stopped(code)


def shield_workers(loader: torch.utils.data.DataLoader) -> None:
    """Let DataLoader workers live on when a signal goes to all processes of a job; they end with their parent.

    Without this, SIGTERM to a process group (torchrun, Slurm) ends the workers at once, and the next batch of a run
    that is about to save fails with "DataLoader worker is killed by signal". When it is killed they outlive it by
    seconds, in which the same command must be able to start.
    """
    loader.worker_init_fn = partial(_shield, loader.worker_init_fn)


def _shield(then: Any, worker: int) -> None:
    let_go_of_inherited_locks()
    signal.set_wakeup_fd(-1)  # inherited: the worker's signals are not its parent's
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if then is not None:
        then(worker)


def _follow_launcher() -> None:
    """Have Linux send a signal when the launcher ends; otherwise the training would live on without anybody.

    torchrun forwards SIGTERM and SIGINT and waits; a second one ends it, and so comes here as a second one. `accelerate
    launch` with one process forwards nothing: its end is a request like Slurm's warning, since after Ctrl-C, which the
    terminal sends to both, it ends before us.
    """
    environ = os.environ
    number = 0
    if "TORCHELASTIC_RUN_ID" in environ:
        number = signal.SIGTERM
    elif "ACCELERATE_MIXED_PRECISION" in environ and "WORLD_SIZE" not in environ:
        number = signal.SIGUSR1
    if number:
        with contextlib.suppress(AttributeError, OSError):  # other systems have no prctl
            ctypes.CDLL(None).prctl(1, number)  # 1 is PR_SET_PDEATHSIG


def _close_loggers() -> None:
    """W&B ends its run when Python exits, which a launcher that is ending may not wait for."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()
