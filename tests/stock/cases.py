"""What can happen to a run, as cases that a trainer passes or not, and how the plain transformers Trainer fails them.

Each case takes a `Program` and raises AssertionError, or TimeoutError, with what went wrong. The sentences are those of
the table in docs/resume.md.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from kill.lab import Fault

from .programs import Program, last_line


class Case(NamedTuple):
    """One row of the table; `stock` says how the plain Trainer fails, or is empty where it does as we do."""

    name: str
    what: str
    run: Callable[[Program], None]
    stock: str
    ours: str
    needs_faults: bool = True


def _killed_between_saves(program: Program) -> None:
    program.finish("straight")
    program.cut("run", 6)
    program.finish("run")
    program.assert_equal("run", "straight")


def _killed_in_a_save(program: Program) -> None:
    program.finish("straight")
    program.train("run", fault=Fault("kill", 12, "checkpoint-6"))
    program.finish("run")
    program.assert_equal("run", "straight")


def _full_disk(program: Program) -> None:
    program.finish("straight")
    if program.train("run", fault=Fault("enospc", 8, "checkpoint-6"))[0].returncode:
        program.finish("run")  # there is room again
    program.assert_equal("run", "straight")


def _damaged(file: str, damage: Callable[[Path], object]) -> Callable[[Program], None]:
    def run(program: Program) -> None:
        program.finish("straight")
        checkpoint = program.cut("run", 6)
        damage(checkpoint / file)
        (training,) = program.train("run")
        if training.returncode == 2 and file in last_line(training):
            return  # refused, and the file is named
        assert training.returncode == 0, f"ended with {training.returncode}: {last_line(training)}"
        program.assert_equal("run", "straight")

    return run


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 0x40
    file.write_bytes(content)


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _longer(program: Program) -> None:
    program.cut("run", 6)
    (training,) = program.train("run", steps=24)
    if training.returncode == 2 and "data.tokens" in training.output:
        return  # refused, and the key is named
    assert training.returncode == 0, f"ended with {training.returncode}: {last_line(training)}"
    rates = [rate for _, (_, rate) in sorted(program.losses("run").items())]
    for step, (before, after) in enumerate(zip(rates, rates[1:], strict=False), start=1):
        assert after <= before, f"the rate falls over the run, but from step {step} to the next it rises to {after:.3g}"


def _other_learning_rate(program: Program) -> None:
    program.finish("straight")
    program.cut("run", 6)
    (training,) = program.train("run", learning_rate=5e-3)
    if training.returncode == 2 and "learning_rate" in training.output:
        return
    assert training.returncode == 0, f"ended with {training.returncode}: {last_line(training)}"
    half = program.losses("straight")[9][1] / 2
    assert abs(program.losses("run")[9][1] - half) < 1e-9, f"step 9 had {program.losses('run')[9][1]}, not {half}"


def _other_save_steps(program: Program) -> None:
    program.cut("run", 6)
    program.finish("run", save_steps=3)
    steps = sorted(int(path.name[11:]) for path in (program.runs / "run").glob("checkpoint-*"))
    assert 9 in steps, f"checkpoints {steps}, none of step 9"


def _between_log_points(program: Program) -> None:
    program.finish("straight", logging_steps=4)
    program.cut("run", 6, logging_steps=4)
    program.finish("run", logging_steps=4)
    program.assert_equal("run", "straight")


def _other_layout(program: Program) -> None:
    program.finish("straight", dropout=0.0, rows=4)
    program.cut("run", 6, dropout=0.0, rows=4)
    program.finish("run", processes=2, dropout=0.0, rows=8)
    assert program.batches("run") == program.batches("straight"), "other global batches"
    for step, (loss, rate) in program.losses("straight").items():
        other = program.losses("run")[step]
        assert abs(other[0] - loss) < 1e-5 and other[1] == rate, f"step {step}: {other}, not {(loss, rate)}"


def _random_state(checkpoint: Path, name: str = "rng_state.pth") -> bytes:
    return torch.load(checkpoint / name, weights_only=False)["cpu"].numpy().tobytes()


def _other_layout_with_dropout(program: Program) -> None:
    program.finish("fresh", keep=9)
    seen = {_random_state(path): path.name for path in (program.runs / "fresh").glob("checkpoint-*")}
    program.cut("run", 6, processes=2)
    program.finish("run", keep=9)
    for path in sorted((program.runs / "run").glob("checkpoint-*")):
        if int(path.name[11:]) > 6:
            repeated = seen.get(_random_state(path))
            assert not repeated, f"random state of {path.name} is that of {repeated} of a run from the beginning"


def _same_masks_on_all_ranks(program: Program) -> None:
    checkpoint = program.cut("run", 2, processes=2)
    first, second = (_random_state(checkpoint, f"rng_state_{rank}.pth") for rank in (0, 1))
    assert first != second, "both processes draw the same dropout masks"


def _second_training(program: Program) -> None:
    first = program.start("run", steps=60)[0]
    while not list((program.runs / "run").glob("checkpoint-*")) and first.poll() is None:
        time.sleep(0.01)
    second = program.start("run", steps=60)[0]
    assert first.wait() == 0, last_line(first)
    assert second.wait() == 2 and "is training it" in second.output, f"the second one ended with {second.returncode}"


def _other_data(program: Program) -> None:
    program.cut("run", 6)
    (program.dataset / "train").rename(program.dataset / "was-train")
    (program.dataset / "validation").rename(program.dataset / "train")  # another text under the same name
    (training,) = program.train("run")
    assert training.returncode == 2, f"trained on other data without a word (ended with {training.returncode})"


def _signal_to_one_of_two(program: Program) -> None:
    long = {"steps": 400, "save_steps": 400, "processes": 2, "stop_on_sigterm": True}
    program.finish("straight", **long)
    ranks = program.start("run", **long)
    _wait_for_step(program, "run", 20)
    ranks[1].kill(signal.SIGTERM)
    for rank in ranks:
        rank.wait(20)
    assert list((program.runs / "run").glob("checkpoint-*")), "nothing was saved"
    program.finish("run", **long)
    program.assert_equal("run", "straight")


def _signal_within_a_step(program: Program) -> None:
    long = {"steps": 400, "save_steps": 400, "stop_on_sigterm": True}
    program.finish("straight", **long)
    for attempt in ("run", "again"):  # a signal may also come between two steps
        (training,) = program.start(attempt, **long)
        _wait_for_step(program, attempt, 20)
        training.kill(signal.SIGTERM)
        training.wait(60)
        program.finish(attempt, **long)
        program.assert_equal(attempt, "straight")


def _wait_for_step(program: Program, run: str, step: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        log = next((program.runs / run).glob("*log.jsonl"), None) or program.runs / run / "metrics.jsonl"
        if log.is_file() and re.search(rf'"step": {step},', log.read_text()):
            return
        time.sleep(0.005)
    raise TimeoutError(f"no step {step}")


_SILENT = "Loaded without a word; other losses and weights."
_BEFORE = "Named, the checkpoint before it is used, bit-equal."

CASES = [
    Case("killed_between_saves", "Killed between two saves, same shape", _killed_between_saves, "", "Bit-equal."),
    Case(
        "killed_in_a_save",
        "Killed during a save",
        _killed_in_a_save,
        "The partial folder is picked; every start fails until a person deletes it.",
        "The last complete one is used, bit-equal.",
    ),
    Case(
        "full_disk",
        "The disk is full during a save, later there is room again",
        _full_disk,
        "Ends with a traceback; the partial folder is picked, and every start fails.",
        "Training goes on, complete checkpoints stay; bit-equal.",
    ),
    *(
        Case(f"lost_{file}", f"`{file}` lost", _damaged(file, Path.unlink), text, _BEFORE)
        for file, text in (
            ("optimizer.pt", "Optimizer and schedule begin anew without a word."),
            ("scheduler.pt", "Optimizer and schedule begin anew without a word."),
            ("rng_state.pth", "The random state is that of step 0 again, without a word."),
            ("trainer_state.json", "Every start fails (FileNotFoundError)."),
        )
    ),
    Case("flipped_optimizer", "A bit of `optimizer.pt` flipped", _damaged("optimizer.pt", _flip), _SILENT, _BEFORE),
    Case("flipped_model", "A bit of the weights flipped", _damaged("model.safetensors", _flip), _SILENT, _BEFORE),
    Case(
        "truncated_optimizer",
        "`optimizer.pt` truncated",
        _damaged("optimizer.pt", _truncate),
        "Every start fails with a traceback.",
        _BEFORE,
    ),
    Case(
        "longer",
        "More steps than before",
        _longer,
        "The schedule is stretched without a word: the learning rate jumps up.",
        "Refused, with both values and the command that extends a run.",
    ),
    Case(
        "other_learning_rate",
        "Another learning rate",
        _other_learning_rate,
        "Ignored without a word.",
        "Refused, with both values.",
    ),
    Case("other_save_steps", "Another `save_steps`", _other_save_steps, "Ignored; a warning.", "Obeyed."),
    Case(
        "between_log_points",
        "Resumed between two log points",
        _between_log_points,
        "The first logged loss covers fewer steps than it says.",
        "Equal.",
    ),
    Case(
        "other_layout",
        "1 process, then 2, without dropout",
        _other_layout,
        "",
        "The same global batches, losses within 1e-5.",
    ),
    Case(
        "other_layout_with_dropout",
        "2 processes, then 1, with dropout",
        _other_layout_with_dropout,
        "The random state of step 0 again: the masks of the first steps are repeated, without a word.",
        "The random state is a new one.",
    ),
    Case(
        "same_masks_on_all_ranks",
        "2 processes with dropout",
        _same_masks_on_all_ranks,
        "Both draw the same dropout masks.",
        "Each draws its own.",
    ),
    Case(
        "second_training",
        "The same command typed twice at once",
        _second_training,
        "Both train and write over each other's files.",
        "The second one is refused.",
        False,
    ),
    Case("other_data", "Other data under the same name", _other_data, "Goes on without a word.", "Refused."),
    Case(
        "signal_to_one_of_two",
        "SIGTERM to one of two processes",
        _signal_to_one_of_two,
        "With `enable_jit_checkpoint`: hangs.",
        "Both save at the same step and stop, bit-equal.",
        False,
    ),
    Case(
        "signal_within_a_step",
        "SIGTERM in the middle of a step",
        _signal_within_a_step,
        "With `enable_jit_checkpoint`: saves in the middle of the step; other losses and weights.",
        "Saves at the end of the step, bit-equal.",
        False,
    ),
]
