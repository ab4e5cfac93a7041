"""Preparations that are stopped: in this process at every rename, or as processes of their own."""

import itertools
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
from conftest import content_of, run_here, write_jsonl

from data_prep.__main__ import main

ROOT = Path(__file__).parents[2]
Found = TypeVar("Found")


class Killed(BaseException):
    """Stands for a kill: nothing of ours may catch it and go on."""


def write_word_files(folder: Path, num_documents: int, num_files: int = 12) -> Path:
    """Files of records, each with so many documents of 1 to 300 words: as many units as files."""
    rng = random.Random(3)
    words = ["the", "river", "carries", "letters", "and", "a", "map", "of", "old", "town", "東京", "naïve"]
    folder.mkdir()
    for number in range(num_files):
        texts = [" ".join(rng.choices(words, k=rng.randint(1, 300))) for _ in range(num_documents)]
        write_jsonl(folder / f"{number:02d}.jsonl", texts, url=[str(index) for index in range(num_documents)])
    return folder


def encoders(process: subprocess.Popen) -> list[psutil.Process]:
    """The workers of a preparation, however it was started: the children of the processes that they are copies of."""
    found = []
    for each in psutil.Process(process.pid).children(recursive=True):
        try:
            if "multiprocessing.forkserver" in " ".join(each.cmdline()) and each.parent().cmdline() == each.cmdline():
                found.append(each)
        except (psutil.Error, AttributeError):  # it has ended, or its parent
            continue
    return found


def stop_at_every_rename(
    command: Callable[[Path], list[str]],
    folder: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    manifests: tuple[str, ...] = ("manifest.json",),
) -> int:
    """Stop a preparation at its first rename, the next at its second ..., and let each go on to the expected bytes.

    Args:
        command: The words of the preparation into a folder.
        manifests: Not all of them are there before it is done.
    Returns:
        The number of preparations; the last one was not stopped.
    """
    rename, limit, is_finished = os.replace, 0, False

    def stop_at(limit: int) -> Callable[[object, object], None]:
        numbers = itertools.count(1)

        def replace(source: object, target: object) -> None:
            if next(numbers) == limit:
                raise Killed
            rename(source, target)

        return replace

    while not is_finished:
        limit += 1
        out = folder / str(limit) / "out"
        monkeypatch.setattr(os, "replace", stop_at(limit))
        try:
            main(command(out))
            is_finished = True
        except Killed:
            assert not all((out / name).exists() for name in manifests)
        monkeypatch.setattr(os, "replace", rename)
        run_here(*command(out))
        assert content_of(out) == expected, f"stopped at rename {limit}"
        shutil.rmtree(out)
    return limit


def start(*words: str) -> subprocess.Popen:
    """A command of data_prep as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "data_prep", *words], env=environment, **pipes)


def wait_for(condition: Callable[[], Found], timeout_s: float = 100) -> Found:
    """What the condition gives as soon as it is something."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError("waited for nothing")
