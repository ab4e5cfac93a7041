"""The curve is that of one process on 2, 4 and 8, and a run goes on with another number of them, ZeRO's too."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from tiny import CONFIG

from clm.checkpoint import find_damage
from clm.retention import reduce_to_weights

from .lab import FSDP2, ROOT, Lab, leftovers, losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None, reason="DeepSpeed compiles its CPU communication and CPU Adam with c++"
)
# The decay is of matrices alone; rows in a step: 16
SHAPE = ("data.tokens=5120", "training.save_steps=3", "training.weight_decay=0.5", "run.retention={last: 9}")


def zero(stage: int, name: str = "zero{}") -> dict[str, str]:
    """What accelerate_configs/zero<stage>.yaml makes a launcher set."""
    file = ROOT / "ds_configs" / f"{name.format(stage)}.json"
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}


@pytest.fixture
def shape(lab: Lab) -> list[str]:
    """Overrides of a short run without dropout, so that only the order of additions differs between layouts."""
    config = lab.folder / "quiet_config.json"
    config.write_text(json.dumps({**CONFIG, "attention_dropout": 0.0}))
    return [*SHAPE, f"model.config={config}"]


def train_on(lab: Lab, name: str, num_processes: int, *overrides: str, env: dict[str, str] | None = None) -> str:
    """Run to the end; what process 0 has printed."""
    rows = f"training.per_device_train_batch_size={min(8, 16 // num_processes)}"
    ranks = lab.start_ranks(name, num_processes, *overrides, rows, env=env)
    codes = [rank.wait(500) for rank in ranks]  # DeepSpeed's CPU Adam is compiled once, in minutes on a busy machine
    assert codes == [0] * num_processes, "\n".join(rank.output for rank in ranks)
    return ranks[0].output


def curve(run: Path) -> list[float]:
    found = losses(run)
    assert [step for step, _, _ in found] == list(range(1, 11))
    return [loss for _, loss, _ in found]


def before_the_end(run: Path, name: str, step: int) -> Path:
    """A copy of a run as if it had been killed after a step."""
    copy = run.with_name(name)
    gone = [path.name for path in run.glob("checkpoint-*") if int(path.name.partition("-")[2]) > step]
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("final", "preflight.json", *gone))
    return copy


def test_two_four_and_eight_processes_have_the_curve_of_one_and_go_on_as_each_other(lab, shape):
    expected = curve(lab.train("one", *shape))
    for number in (2, 4, 8):
        train_on(lab, f"on-{number}", number, *shape)
        assert curve(lab.runs / f"on-{number}") == pytest.approx(expected, rel=1e-5)
    for number, others in ((8, 4), (2, 8)):
        run = before_the_end(lab.runs / f"on-{number}", f"from-{number}-to-{others}", 3)
        assert "checkpoint-3 (step 3" in train_on(lab, run.name, others, *shape)
        assert curve(run) == pytest.approx(expected, rel=1e-5)


@needs_compiler
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_goes_on_with_another_number_of_processes_once_its_checkpoint_is_converted(lab, shape, run_cli, stage):
    pytest.importorskip("deepspeed", exc_type=ImportError)
    expected = curve(lab.train("one", *shape))
    train_on(lab, "two", 2, *shape, env=zero(stage))
    two = lab.runs / "two"
    assert curve(two) == pytest.approx(expected, rel=1e-5)

    # 2 -> 1 is refused with the command that converts
    one = before_the_end(two, "to-one", 3)
    (refused,) = lab.start_ranks("to-one", 1, *shape, env=zero(stage))
    assert refused.wait() == 2 and "by DeepSpeed with 2 processes" in refused.output, refused.output
    command = re.search(r"type this command again: python (-m clm convert \S+)", refused.output)[1].split()
    before = json.loads((one / "checkpoint-3" / "checkpoint.json").read_text())
    done = run_cli(command)
    assert done.code == 0 and "any number of processes" in done.stdout, done.stderr
    checkpoint = one / "checkpoint-3"
    after = json.loads((checkpoint / "checkpoint.json").read_text())
    assert find_damage(checkpoint) is None and leftovers(one) == []
    assert before["files"].items() <= after["files"].items(), "what it held is still there"
    assert {k: v for k, v in before.items() if k not in ("files", "sha256")} == {
        k: v for k, v in after.items() if k not in ("files", "sha256")
    }
    assert "is converted already" in run_cli(command).stdout

    # DDP, one process, FSDP2 and the two of before read what was converted
    converted = {name: before_the_end(one, name, 3) for name in ("again", "alone", "ddp", "fsdp2", "other-stage")}
    assert "continuing from" in train_on(lab, "to-one", 1, *shape, env=zero(stage))
    assert curve(one) == pytest.approx(expected, rel=1e-5)
    for name, number, env in (
        ("again", 2, zero(stage)),
        ("alone", 1, None),
        ("ddp", 2, None),
        ("fsdp2", 2, FSDP2),
    ):
        assert "continuing from" in train_on(lab, name, number, *shape, env=env)
        assert curve(converted[name]) == pytest.approx(expected, rel=1e-5), name
    assert curve(converted["again"]) == curve(two), "bit for bit: the same layout"
    other = lab.start_ranks("other-stage", 2, *shape, env=zero(5 - stage))
    assert [rank.wait() for rank in other] == [2, 2]
    assert f"which ZeRO stage {5 - stage} cannot read" in other[0].output, other[0].output

    # and on: 1 -> 4
    four = before_the_end(one, "to-four", 6)
    assert run_cli(["-m", "clm", "convert", four / "checkpoint-6"]).code == 0
    assert "checkpoint-6 (step 6" in train_on(lab, "to-four", 4, *shape, env=zero(stage))
    assert curve(four) == pytest.approx(expected, rel=1e-5)
    weights = reduce_to_weights(converted["ddp"] / "checkpoint-3")
    assert not [path.name for path in weights.iterdir() if "universal" in path.name or path.name.startswith("global")]


@needs_compiler
def test_zero_3_with_offload_has_the_curve_of_one_process_and_goes_on_in_other_layouts(lab, shape, run_cli):
    pytest.importorskip("deepspeed", exc_type=ImportError)
    expected = curve(lab.train("one", *shape))
    offload = zero(3, "zero3_offload")
    train_on(lab, "two", 2, *shape, env=offload)
    two = lab.runs / "two"
    assert curve(two) == pytest.approx(expected, rel=1e-5)
    again = before_the_end(two, "again", 3)
    assert run_cli(["-m", "clm", "convert", again / "checkpoint-3"]).code == 0
    alone, one = (before_the_end(again, name, 3) for name in ("alone", "on-one"))
    for run, number, env in ((again, 2, offload), (one, 1, offload), (alone, 1, None)):
        assert "continuing from" in train_on(lab, run.name, number, *shape, env=env)
        assert curve(run) == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("faults")
@needs_compiler
def test_a_conversion_that_is_killed_or_has_no_room_leaves_the_checkpoint_as_it_was(lab, shape, run_cli, fault_library):
    pytest.importorskip("deepspeed", exc_type=ImportError)
    train_on(lab, "two", 2, *shape, env=zero(2))
    run = before_the_end(lab.runs / "two", "converted", 3)
    checkpoint = run / "checkpoint-3"
    before = json.loads((checkpoint / "checkpoint.json").read_text())
    command = ["-m", "clm", "convert", checkpoint]
    fault = {"LD_PRELOAD": str(fault_library), "FAULT_UNDER": str(run), "FAULT_EXCEPT": ".lock"}
    for kind, place in (("enospc", "global_step3_universal/zero/"), ("kill", "global_step3_universal/zero/")):
        done = run_cli(command, env={**fault, "FAULT_KIND": kind, "FAULT_AT": "20", "FAULT_FROM": place})
        assert done.code == (2 if kind == "enospc" else -9), done.stderr
        assert kind == "kill" or ("the disk is full" in done.stderr and leftovers(run) == []), done.stderr
        assert json.loads((checkpoint / "checkpoint.json").read_text()) == before and find_damage(checkpoint) is None
    # the old one is out of the way, the new one not yet in its place
    at_the_end = {**fault, "FAULT_AT": "1", "FAULT_FROM": "converted/checkpoint-3", "FAULT_KIND": "eio"}
    done = run_cli(command, env=at_the_end)
    assert done.code == 2 and "Input/output error" in done.stderr and not checkpoint.exists(), done.stderr
    shutil.copytree(run, spare := run.with_name("spare"))
    done = train_on(lab, "spare", 1, *shape)
    assert "checkpoint-3 (step 3" in done and find_damage(spare / "checkpoint-3") is None
    assert "is converted already" in run_cli(command).stdout
    assert find_damage(checkpoint) is None and leftovers(run) == []


def test_what_cannot_be_converted_is_refused_and_nothing_is_changed(lab, shape, run_cli):
    run = lab.train("one", *shape)
    for name, expected in (
        ("checkpoint-3", "was not written by DeepSpeed. Any number of processes reads it as it is."),
        ("checkpoint-4", "is no complete checkpoint"),
    ):
        done = run_cli(["-m", "clm", "convert", run / name])
        assert done.code == 2 and expected in done.stderr and "Traceback" not in done.stderr
