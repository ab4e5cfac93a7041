"""The global batch of a step is the same however it is divided, and wherever a run was killed and went on.

    KILL_SEED=7 TRIALS=50 pytest -m slow tests/verify/test_layouts.py

A run with a mixture, stages of other row lengths and batches, and a SIGKILL between two layouts drawn at random among
1, 2 and 4 processes, 1 and 2 blocks a micro-batch (accumulation follows), 0 and 2 DataLoader workers.
"""

from __future__ import annotations

import itertools
import json
import os
import random
from pathlib import Path

import pytest

from clm.fork_server import ForkServer
from clm.plan import Plan
from clm.run_folder import read_metrics
from clm.verify import Lab, batches, column, last_step, rates
from clm.verify_recipe import SAVE_STEPS, Layout, load_copy

from .test_verify import CONFIG

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

SEED = int(os.environ["KILL_SEED"])  # tests/conftest.py draws one and shows it
TRIALS = int(os.environ.get("TRIALS", "6"))
LAYOUTS = [Layout(*each) for each in itertools.product((1, 2, 4), (1, 2), (0, 2))]

RECIPE = """\
model:
  config: {config}
data:
  stages:
    - {{name: short, tokens: 2048, block_size: 16, mixture: [{{dataset: {first}}}]}}
    - name: both
      tokens: 2048
      mixture: [{{dataset: {first}, weight: 0.3}}, {{dataset: {second}, weight: 0.7}}]
    - {{name: large, tokens: 3072, tokens_per_step: 1024, mixture: [{{dataset: {second}}}], rope: {{rope_theta: 50000}},
       schedule: {{shape: 1-sqrt, end: 0.0}}}}
  block_size: 32
  tokens_per_step: 512
  validation: []
run:
  record_blocks: true
  preflight: false
training:
  per_device_train_batch_size: 2
  learning_rate: 1e-2
  warmup_steps: 2
  logging_steps: 1
  save_steps: 2
  ddp_timeout: 60
  use_cpu: true
  seed: 3
"""


@pytest.fixture(scope="module")
def server():
    with ForkServer({"OMP_NUM_THREADS": "1"}) as running:
        yield running


@pytest.fixture
def lab(server, tmp_path: Path) -> Lab:
    return Lab(server, tmp_path)


def write_recipe(folder: Path, dropout: float, first: Path, second: Path) -> Path:
    """4 steps of 8 blocks, 4 of 8, 3 of 16; a block has 64 tokens."""
    config = folder / f"config-{dropout}.json"
    config.write_text(json.dumps({**CONFIG, "attention_dropout": dropout}))
    recipe = folder / f"staged-{dropout}.yaml"
    recipe.write_text(RECIPE.format(config=config, first=first, second=second))
    return recipe


def kill_in(lab: Lab, recipe: Path, plan: Plan, layout: Layout, rng: random.Random) -> None:
    """A run that is killed after a random step."""
    lab.kill(recipe, plan, layout, rng, after=rng.randint(0, plan.num_steps - 2 * SAVE_STEPS))


def sorted_batches(run: Path) -> dict[int, list[int]]:
    return {step: sorted(samples) for step, (samples, _) in batches(run).items()}


def test_any_two_layouts_and_any_kill_between_them_give_the_same_batches(lab, tmp_path, prepared, second_dataset):
    print(f"KILL_SEED={SEED} TRIALS={TRIALS}")
    rng = random.Random(SEED)
    recipe = write_recipe(tmp_path, 0.0, prepared.folder, second_dataset)
    straight = load_copy(recipe, "straight")
    lab.finish(recipe, straight, Layout(1, 2, 0))
    expected = {k: straight.timeline.samples_of_step(k).tolist() for k in range(1, straight.num_steps + 1)}
    assert [len(expected[step]) for step in (1, 4, 5, 8, 9, 11)] == [8, 8, 8, 8, 16, 16]
    base = lab.runs / "straight"
    assert sorted_batches(base) == expected
    for trial in range(TRIALS):
        before, after = rng.choice(LAYOUTS), rng.choice(LAYOUTS)
        plan = load_copy(recipe, f"trial-{trial}")
        kill_in(lab, recipe, plan, before, rng)
        run = lab.runs / plan.recipe.name
        told = f"{before}, killed after step {last_step(run)}, then {after}"
        print(told)
        lab.finish(recipe, plan, after)
        assert sorted_batches(run) == expected, told
        assert rates(run) == rates(base), told
        ours, theirs = column(run, "loss"), column(base, "loss")
        assert ours.keys() == theirs.keys()
        assert max(abs(ours[step] - theirs[step]) for step in theirs) < 1e-5, told
        tokens = {r["step"]: r["tokens"] for r in read_metrics(run) if "loss" in r}
        assert tokens == {step: straight.timeline.tokens_before(step) for step in theirs}


@pytest.mark.parametrize("layout", [Layout(1, 1, 2), Layout(2, 2, 2), Layout(4, 1, 0)], ids=str)
def test_a_run_killed_and_resumed_in_its_own_layout_has_the_same_weights(
    lab, layout, tmp_path, prepared, second_dataset
):
    print(f"KILL_SEED={SEED}")
    rng = random.Random(f"{SEED} {layout}")
    recipe = write_recipe(tmp_path, 0.1, prepared.folder, second_dataset)
    straight, killed = (load_copy(recipe, name) for name in ("straight", "killed"))
    lab.finish(recipe, straight, layout)
    for _ in range(2):
        kill_in(lab, recipe, killed, layout, rng)
    lab.finish(recipe, killed, layout)
    one, other = (lab.runs / name for name in ("straight", "killed"))
    assert batches(one) == batches(other)
    assert column(one, "loss") == column(other, "loss") and rates(one) == rates(other)
    names = sorted(path.name for path in (one / "final").glob("*.safetensors"))
    assert names and all((one / "final" / n).read_bytes() == (other / "final" / n).read_bytes() for n in names)
