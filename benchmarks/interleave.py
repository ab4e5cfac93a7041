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
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO

from benchmarks.variants import Settings


class Variant:
    """A variant's process; `said` is an open file for what it says on stderr: a pipe would be full some day."""

    def __init__(self, settings: Settings, said: TextIO):
        self.settings = settings
        self.first: dict[str, Any] = {}
        self.warm_up_s = 0.0
        self.said = said
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.variants", json.dumps(dataclasses.asdict(settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
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

    def end(self) -> None:
        """Stop it at once."""
        self.process.kill()
        self.process.wait()


@contextmanager
def start(settings: list[Settings], num_warm_up_steps: int) -> Iterator[list[Variant]]:
    """The variants after their first steps, one after the other, which compile and warm up.

    Of each variant `warm_up_s` is set, the seconds from its start to the end of those steps, and `first`, its answer.
    """
    with ExitStack() as stack:
        variants: list[Variant] = []
        for one in settings:
            began_at = time.perf_counter()
            variant = Variant(one, stack.enter_context(tempfile.TemporaryFile("w+")))
            stack.callback(variant.end)
            variants.append(variant)
            variant.first = variant.make_steps(num_warm_up_steps)
            variant.warm_up_s = time.perf_counter() - began_at
        yield variants
