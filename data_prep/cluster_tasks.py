"""The parts of a preparation that many machines do side by side, each a function of (rank, world size).

In: a preparation whose units are listed in its working folder, which all machines see. Out: token runs (encode), then
what of them is kept (gather), shards (shards), and the manifest (finish): the files that one process would have made.
A part that was done before is not done again. datatrove's executors call these; nothing here needs datatrove.
"""

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.align import Taken, write_split
from data_prep.downloads import Downloads
from data_prep.encode import Job, load_result
from data_prep.errors import UserError
from data_prep.fast_encoder import EncoderMismatchError
from data_prep.manifest import SPLITS, token_dtype
from data_prep.output import write_bytes_whole
from data_prep.packing import CONCAT
from data_prep.plan import Options, Plan, make_plan
from data_prep.prep import Settled, encode_all, prepare, settle
from data_prep.progress import Progress
from data_prep.proof import choose_or_give_up, note_mismatch
from data_prep.settled import ALIGN_STATE, is_complete, lock
from data_prep.workers import Workers

JOBS = "jobs.pickle"  # in the working folder


def list_jobs(plan: Plan, options: Options, stream_jobs: Callable[[Settled, Any], list[Job]]) -> list[Job]:
    """Settle the preparation and list its units where every machine finds them.

    Args:
        stream_jobs: the jobs, from what is settled and the encoder.
    """
    with _working_in(plan):
        settled = settle(plan)
        encoder = choose_or_give_up(plan, settled.stream, settled.tokenizer, options.encoder)
        jobs = stream_jobs(settled, encoder)
        content = {"jobs": jobs, "sources": plan.sources, "files": settled.files, "keep": plan.keep_downloads}
        write_bytes_whole(plan.work / JOBS, pickle.dumps(content))
    return jobs


@dataclass(frozen=True)
class EncodeTask:
    """The units of one rank: consecutive ones, so that a file that has to be downloaded goes to one machine."""

    work: Path

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        """What datatrove calls; `data` is of its pipelines."""
        if (self.work / ALIGN_STATE).exists():  # all is gathered, and runs are being used up
            return
        content = pickle.loads((self.work / JOBS).read_bytes())
        jobs = content["jobs"]
        mine = jobs[rank * len(jobs) // world_size : (rank + 1) * len(jobs) // world_size]
        mine = [job for job in mine if load_result(job) is None]
        if not mine:
            return
        folder = self.work / f"downloads-{rank}-of-{world_size}"
        downloads = Downloads(content["sources"], content["files"], folder, content["keep"])
        try:
            with Workers(1, is_apart=True) as workers:
                for job, _ in workers.run(_fetched(mine, downloads), lambda *counts: None):
                    downloads.done_with(job.unit.pieces)
        except EncoderMismatchError as mismatch:
            note_mismatch(self.work, mismatch)
            raise UserError(
                f"{mine[0].work.parent}: the fast encoder gave other ids than the reference. The same command again "
                "does everything with the reference."
            ) from mismatch
        finally:
            downloads.close()


def _fetched(jobs: list[Job], downloads: Downloads) -> Iterator[Job]:
    for job in jobs:
        pieces = tuple(replace(piece, path=downloads.path(piece.file)) for piece in job.unit.pieces)
        downloads.fetch_unit(pieces)
        yield replace(job, unit=replace(job.unit, pieces=pieces))


@dataclass(frozen=True)
class GatherTask:
    """What of all units is kept, and the ledgers; units that are missing are encoded here."""

    options: Options

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        """As EncodeTask's."""
        plan = make_plan(self.options)
        if not is_complete(plan):
            with _working_in(plan), Workers(1, is_apart=True) as workers:
                encode_all(plan, settle(plan), workers, self.options.encoder)


@dataclass(frozen=True)
class ShardTask:
    """Each `world_size`-th shard of each split."""

    options: Options

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        """As EncodeTask's."""
        plan = make_plan(self.options)
        if is_complete(plan) or plan.packing != CONCAT:  # packed shards follow one another: the last step writes them
            return
        settled = settle(plan)
        with Workers(1) as workers:
            state = encode_all(plan, settled, workers, self.options.encoder)  # which is gathered
        taken = [Taken(**unit) for unit in state["units"]]
        dtype = token_dtype(settled.tokenizer.vocab_size)
        for bucket, folder in plan.outputs.items():
            folder.mkdir(exist_ok=True)
            for split in SPLITS:
                part = (rank, max(world_size, 2))
                progress = Progress("writing", None)
                write_split(folder, plan.work, bucket, split, taken, plan.block_size, dtype, progress, part)


@dataclass(frozen=True)
class FinishTask:
    """The rest, as one process does it."""

    options: Options

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        """As EncodeTask's."""
        prepare(replace(self.options, num_proc=1))


@contextmanager
def _working_in(plan: Plan) -> Iterator[None]:
    with lock(plan):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        yield
