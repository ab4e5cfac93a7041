"""How far the encoding of a preparation is, also of one that goes on after it was stopped.

In: jobs as they are handed out and units as they are taken. Out: a `Progress`: of the input's bytes, or, where a cap
ends the stream, of what the cap counts. A unit that an earlier attempt finished counts as done and not as speed.
"""

from collections.abc import Iterator

from data_prep.align import Taken
from data_prep.encode import Job
from data_prep.plan import Plan
from data_prep.progress import Progress
from data_prep.stream import Stream


class EncodingProgress(Progress):
    """The progress of the stage `encoding`."""

    def __init__(self, plan: Plan, stream: Stream):
        self.keys_before: set[str] = set()
        caps = [source.max_documents for source in plan.sources]
        if plan.max_tokens is not None:
            super().__init__("encoding", plan.max_tokens, "tokens")
        elif plan.max_docs is not None or all(caps):
            in_all = sum(caps) if all(caps) else plan.max_docs
            super().__init__("encoding", min(in_all, plan.max_docs or in_all), "documents")
        else:  # with a cap on some sources nobody knows how much of the others' input is left to read
            num_readings = 2 if plan.filters is not None and plan.filters.is_screened else 1
            size = sum(file.size for _, file in stream.files) * num_readings
            super().__init__("encoding", None if any(caps) else size)

    def watch(self, jobs: Iterator[Job | None]) -> Iterator[Job | None]:
        """The same jobs; notes which an earlier attempt finished."""
        for job in jobs:
            if job is not None and (job.work / f"{job.key}.json").exists():
                self.keys_before.add(job.key)
            yield job

    def take(self, job: Job, taken: Taken | None) -> None:
        """A unit was taken, or None of it."""
        was_done = job.key in self.keys_before
        if self.unit == "B":
            self.add_input(job.unit.num_bytes, was_done)
        elif taken is not None:
            self.add_input(sum(taken.num_tokens.values()) if self.unit == "tokens" else taken.num_rows, was_done)
