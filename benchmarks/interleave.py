"""Runs variants (benchmarks/variants.py) in turns, so that a machine whose speed drifts slows down all of them alike.

In: settings. Out: answers: A B C A B C ... Each variant is a process; while one makes its steps the others wait.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.variants import Settings


class Variant:
    """A variant's process."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.first: dict[str, Any] = {}
        self.warm_up_s = 0.0
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.variants", json.dumps(dataclasses.asdict(settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,  # a pipe would be full some day, and stop it
            text=True,
        )

    def make_steps(self, num_steps: int, how: str = "") -> dict[str, Any]:
        """Have it make steps; returns its answer.

        Args:
            how: examine or evaluate (benchmarks/turns.py).
        Raises:
            RuntimeError: the process has ended; with the end of what it said.
        """
        try:
            print(num_steps, how, file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.process.wait()
            self.said.seek(0)
            raise RuntimeError(f"{self.settings.variant} has ended:\n{self.said.read()[-2000:]}")
        return json.loads(line)


@contextmanager
def start(settings: list[Settings], num_warm_up_steps: int) -> Iterator[list[Variant]]:
    """The variants after their first steps, one after the other, which compile and warm up.

    Of each variant `warm_up_s` is set, the seconds from its start to the end of those steps, and `first`, its answer.
    """
    variants: list[Variant] = []
    try:
        for one in settings:
            began_at = time.perf_counter()
            variants.append(Variant(one))
            variants[-1].first = variants[-1].make_steps(num_warm_up_steps)
            variants[-1].warm_up_s = time.perf_counter() - began_at
        yield variants
    finally:
        for variant in variants:
            variant.process.kill()
            variant.process.wait()
            variant.said.close()
