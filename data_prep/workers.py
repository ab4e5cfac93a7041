"""Worker processes for units: results in order, a bounded number of units ahead, a dead worker named.

In: jobs, lazily, and None where what comes next depends on the results so far. Out: (job, result) in the order of the
jobs, whoever finished first. A worker is a process of its own (data_prep/worker_server.py) that gets one job at a time
through a pipe. One worker means this process.
"""

import errno
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

from data_prep.encode import Job, UnitResult, encode_unit, load_result
from data_prep.errors import UserError
from data_prep.fast_encoder import EncoderMismatchError
from data_prep.worker_server import worker_context

# What "no room" looks like: a full disk, a full quota, a limit on file size.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNITS_AHEAD = 4  # per worker: how far others may run ahead of the slowest unit
MAX_TRIES = 2
Report = Callable[[int, int], None]


class Workers:
    """So many workers; the processes are started at once, so that their imports and ours run side by side.

    With `is_apart` one worker too is a process of its own, whose death this one survives.
    """

    def __init__(self, num_proc: int, is_apart: bool = False):
        self.num_proc = num_proc
        self._pool = _Pool(num_proc) if num_proc > 1 or is_apart else None

    def run(self, jobs: Iterator[Job | None], report: Report) -> Iterator[tuple[Job, UnitResult]]:
        """Encode all jobs, in order. Units that an earlier attempt finished are not encoded again.

        Raises:
            UserError: no room on the disk, or a worker died twice over one unit. Finished units are kept.
        """
        if self._pool is None:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            for job in filter(None, jobs):
                yield job, load_result(job) or _encode_here(job, report)
        else:
            yield from self._pool.run(jobs, report)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.close()


def explain_no_room(error: OSError, folder: object) -> UserError:
    """The message for a disk that is full."""
    return UserError(
        f"{folder}: {error.strerror} while writing. What is finished is kept. "
        "Make room (or give another folder with OUT=... and DATA_DIR); then the same command continues."
    )


def _encode_here(job: Job, report: Report) -> UnitResult:
    try:
        return encode_unit(job, report)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise explain_no_room(error, job.work.parent) from error
        raise


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    index: int | None = None  # of the job in its hands


class _Pool:
    def __init__(self, num_proc: int):
        self.context = worker_context()
        self.num_proc = num_proc
        self.workers: list[_Worker] = []
        self._begin()
        for _ in range(num_proc):
            self._start_worker()

    def _begin(self) -> None:
        self.jobs: dict[int, Job] = {}  # taken from the iterator and not yet handed out
        self.results: dict[int, UnitResult] = {}
        self.tries: dict[int, int] = {}

    def run(self, jobs: Iterator[Job | None], report: Report) -> Iterator[tuple[Job, UnitResult]]:
        if self.jobs or self.results:  # of a run that was given up
            self._begin()
        self.report = report
        for worker in [worker for worker in self.workers if worker.index is not None]:
            self._dismiss(worker)
        next_in = next_out = 0
        waiting: list[int] = []  # to be encoded
        is_exhausted = is_held = False
        while True:
            while next_out in self.results:
                yield self.jobs.pop(next_out), self.results.pop(next_out)
                next_out += 1
            is_held = is_held and next_out < next_in
            idle_slots = self.num_proc - sum(worker.index is not None for worker in self.workers)
            is_room = next_in - next_out < UNITS_AHEAD * self.num_proc
            while not is_exhausted and not is_held and is_room and len(waiting) < idle_slots:
                try:
                    job = next(jobs)
                except StopIteration:
                    is_exhausted = True
                    break
                if job is None:
                    is_held = next_out < next_in
                    continue
                self.jobs[next_in] = job
                finished = load_result(job)
                if finished is not None:
                    self.results[next_in] = finished
                else:
                    waiting.append(next_in)
                next_in += 1
                is_room = next_in - next_out < UNITS_AHEAD * self.num_proc
                if next_out in self.results:
                    break  # hand it out before looking further
            if next_out in self.results:
                continue
            while waiting and (worker := self._idle_worker()) is not None:
                self._send(worker, waiting.pop(0))
            if next_in == next_out and is_exhausted:
                return
            waiting[:0] = self._receive()

    def close(self) -> None:
        for worker in self.workers:
            worker.process.terminate()
        for worker in self.workers:
            worker.process.join()
            worker.pipe.close()

    def _idle_worker(self) -> _Worker | None:
        for worker in self.workers:
            if worker.index is None:
                return worker
        return None if len(self.workers) == self.num_proc else self._start_worker()

    def _dismiss(self, worker: _Worker) -> None:
        worker.process.terminate()
        worker.process.join()
        worker.pipe.close()
        self.workers.remove(worker)

    def _start_worker(self) -> _Worker:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(
            target=_serve, args=(theirs,), daemon=True, name=f"encoder {len(self.workers) + 1}"
        )
        process.start()
        theirs.close()  # so that its death ends the pipe
        self.workers.append(_Worker(process, ours))
        return self.workers[-1]

    def _send(self, worker: _Worker, index: int) -> None:
        worker.index = index
        self.tries[index] = self.tries.get(index, 0) + 1
        with suppress(OSError):  # it is dead: the next wait on its pipe sees it and tries the unit again
            worker.pipe.send(self.jobs[index])

    def _receive(self) -> list[int]:
        """Wait for messages; the jobs that must be tried again."""
        again = []
        for pipe in wait([worker.pipe for worker in self.workers if worker.index is not None]):
            worker = next(worker for worker in self.workers if worker.pipe is pipe)
            try:
                kind, value = pipe.recv()
            except (EOFError, OSError):
                again.append(self._bury(worker))
                continue
            if kind == "progress":
                self.report(*value)
            elif kind == "no room":
                raise explain_no_room(value, self.jobs[worker.index].work.parent) from value
            elif kind == "user error":
                raise UserError(value)
            elif kind == "mismatch":
                raise EncoderMismatchError(value)
            elif kind == "crash":
                raise RuntimeError(f"{worker.process.name} failed:\n{value}")
            else:
                self.results[worker.index], worker.index = value, None
        return again

    def _bury(self, worker: _Worker) -> int:
        worker.process.join()
        self.workers.remove(worker)
        worker.pipe.close()
        index, code = worker.index, worker.process.exitcode
        piece = self.jobs[index].unit.pieces[0]
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        who = f"{worker.process.name} (process {worker.process.pid})"
        died = f"{who} {how} while it encoded {piece.path} from {piece.start:,} on"
        if self.tries[index] == MAX_TRIES:
            raise UserError(
                f"{died}, for the second time. Most often the machine is out of memory: try a smaller --num-proc. "
                "What is finished is kept; the same command continues."
            )
        print(f"warning: {died}; its unit is tried once more.", file=sys.stderr)
        return index


def _serve(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends us
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core is the parallelism
    try:
        while True:
            job = pipe.recv()
            pipe.send(_answer(job, pipe))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone


def _answer(job: Job, pipe: Connection) -> tuple[str, object]:
    try:
        return "done", encode_unit(job, lambda *counts: pipe.send(("progress", counts)))
    except BrokenPipeError:
        raise
    except UserError as error:
        return "user error", str(error)
    except EncoderMismatchError as error:
        return "mismatch", error.evidence
    except OSError as error:
        if error.errno in NO_ROOM:
            return "no room", error
        return "crash", traceback.format_exc()
    except Exception:
        return "crash", traceback.format_exc()
