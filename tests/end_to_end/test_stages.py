"""A run with stages and a mixture is one run: the same batches, curve and weights however it is cut up."""

import json
import random
import shutil

import numpy as np
import pytest

from clm.replay import open_replay
from clm.run_folder import list_checkpoints

from .conftest import losses, quiet_config, read_metrics, recorded
from .test_launch import BIN, launch


def test_stages_change_batch_rows_rope_and_rate_at_their_borders_only(train, staged, prepared, second_dataset):
    run = train(*staged, name="staged")
    replay = open_replay(run)
    assert [s.num_steps for s in replay.timeline.stages] == [10, 10, 2]
    assert recorded(run) == {k: replay.timeline.samples_of_step(k).tolist() for k in range(1, 23)}
    records = read_metrics(run)
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 23))
    tokens = {r["step"]: r["tokens"] for r in records if "loss" in r}
    assert (tokens[10], tokens[11], tokens[22]) == (2560, 3072, 8704)
    rates = {r["step"]: r["learning_rate"] for r in records if "loss" in r}
    assert rates[20] > rates[21] > rates[22] > 0
    stages = [r for r in records if "stage" in r]
    assert [(r["stage"], r["step"]) for r in stages] == [("short", 10), ("long", 20), ("cool", 22)]
    first, other = str(prepared.folder), str(second_dataset)
    assert stages[0]["shares"] == {first: 1.0} and stages[2]["shares"] == {first: 1.0}
    _, dataset, _ = (np.concatenate(x) for x in zip(*(replay.blocks_of_step(k) for k in range(11, 21)), strict=True))
    assert stages[1]["shares"] == {first: np.mean(dataset == 0), other: np.mean(dataset == 1)}
    assert json.loads((run / "final" / "config.json").read_text())["rope_parameters"]["rope_theta"] == 50000
    assert 10 in [step for step, _ in list_checkpoints(run)] or len(list_checkpoints(run)) == 2
    evaluations = [r["step"] for r in records if "eval_loss" in r]
    assert evaluations == [0, 10, 20, 22], "each stage ends with an evaluation"


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_a_staged_run_cut_at_any_step_ends_the_same(train, staged, seed):
    straight = train(*staged, "training.save_steps=1", "run.retention={last: 99}", name="straight")
    cut = random.Random(seed).sample(range(1, 22), 2)
    run = straight.with_name("straight")
    whole = (losses(run), recorded(run), (run / "final" / "model.safetensors").read_bytes())
    for step in sorted(cut, reverse=True):  # as if everything after that checkpoint had never been written
        (run / "final").rename(run / f"gone-{step}")
        for number, path in list_checkpoints(run):
            if number > step:
                path.rename(run / f"gone-{step}-{number}")
        train(*staged, "training.save_steps=1", "run.retention={last: 99}", name="straight")
        assert (losses(run), recorded(run), (run / "final" / "model.safetensors").read_bytes()) == whole


@pytest.mark.slow
def test_another_layout_trains_on_the_same_batches(train, staged, recipe):
    quiet = quiet_config(recipe)
    one = train(*staged, quiet, name="one")
    for number, overrides in enumerate(
        (
            ["training.per_device_train_batch_size=2"],
            ["training.per_device_train_batch_size=8", "training.dataloader_num_workers=2"],
        )
    ):
        other = train(*staged[:3], quiet, *overrides, name=f"other{number}")
        assert recorded(other) == recorded(one)
        for step, loss in losses(one).items():
            assert losses(other)[step] == pytest.approx(loss, abs=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed compiles its CPU communication with c++")
@pytest.mark.parametrize("zero", [2, 3])
def test_stages_under_deepspeed_are_those_of_one_process(train, staged, recipe, zero):
    pytest.importorskip("deepspeed", exc_type=ImportError)
    quiet = quiet_config(recipe)
    one = train(*staged, quiet, name="one")
    config = f"accelerate_configs/zero{zero}.yaml"
    command = [str(BIN / "accelerate"), "launch", "--quiet", "--config_file", config, "--num_processes", "2"]
    command += ["--main_process_port", "0", "run_clm.py", str(recipe), *staged, quiet, "training.run_name=two"]
    command += ["training.per_device_train_batch_size=2"]
    done = launch(*command)
    assert done.returncode == 0, done.stderr
    two = one.with_name("two")
    assert recorded(two, 2) == recorded(one)
    assert losses(two) == pytest.approx(losses(one), abs=2e-5)
    config = json.loads((two / "final" / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == 50000
