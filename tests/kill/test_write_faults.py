"""Every file operation of a save fails once, fails for good, or is the last thing the process does.

The operations of one save with its rotation are listed from an undisturbed run; then one run for each of them. The one
operation of a save that fault.c cannot see is the rename inside safetensors, a system call without libc; what comes
before and after it is there.
"""

from __future__ import annotations

import signal

import pytest

from .lab import Fault, Lab, assert_same_run, leftovers, resumable_step, resumed_from

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("faults"), pytest.mark.timeout(1500)]

FAST = ("run.preflight=false",)
SAVE = "checkpoint-4"  # of steps 2, 4, 6: there is one before it, which is rotated away, and training goes on after it


def list_save(lab: Lab) -> list[int]:
    """Numbers of the operations from the first one of checkpoint-4 up to the first one of checkpoint-6.

    Of a long row of writes to one file the first, a middle one and the last two stand for all.
    """
    operations = lab.operations("listed", *FAST, begin=SAVE)
    ours = operations[: next(i for i, each in enumerate(operations) if "checkpoint-6" in each)]
    assert any(each.startswith(("unlink", "rmdir")) and "checkpoint-2" in each for each in ours), (
        "rotation is part of it"
    )
    rows: list[list[int]] = []
    for number, each in enumerate(ours, start=1):
        if rows and each.startswith("write") and each == ours[number - 2]:
            rows[-1].append(number)
        else:
            rows.append([number])
    return sorted({n for row in rows for n in (row[0], row[len(row) // 2], row[-1], row[max(0, len(row) - 2)])})


def test_a_kill_at_any_operation_of_a_save_loses_nothing_complete(lab):
    straight = lab.train("straight", *FAST)
    numbers = list_save(lab)
    for number in numbers:
        name = f"killed-{number}"
        killed = lab.start(name, *FAST, fault=Fault("kill", number, SAVE))
        assert killed.wait() == -signal.SIGKILL, killed.output
        step = resumable_step(lab.runs / name)
        assert step, f"operation {number}: there was always a complete checkpoint"
        resumed = lab.start(name, *FAST)
        assert resumed.wait() == 0, resumed.output
        assert resumed_from(resumed) == step
        assert_same_run(lab.runs / name, straight)
        assert leftovers(lab.runs / name) == []
    print(f"{len(numbers)} operations, killed at each")


@pytest.mark.parametrize("kind", ["eio", "enospc"])
def test_a_write_that_fails_at_any_operation_of_a_save_loses_nothing_complete(lab, kind):
    straight = lab.train("straight", *FAST)
    numbers, ended = list_save(lab), []
    for number in numbers:
        name = f"{kind}-{number}"
        disturbed = lab.start(name, *FAST, fault=Fault(kind, number, SAVE))
        code = disturbed.wait()
        step = resumable_step(lab.runs / name)
        assert step, f"operation {number}: there was always a complete checkpoint"
        if code:
            ended.append(number)
            assert (lab.runs / name / "final").exists() is False
            resumed = lab.start(name, *FAST)
            assert resumed.wait() == 0, resumed.output
            assert resumed_from(resumed) == step
        assert_same_run(lab.runs / name, straight)
    print(f"{len(numbers)} operations; the run ended at {len(ended)} of them: {ended}")
