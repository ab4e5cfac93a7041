"""`tune`: which micro-batches there are, which is taken, and how one value of a recipe is changed."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from tiny import CONFIG

from clm.__main__ import main
from clm.plan import make_plan
from clm.recipe import load_recipe
from clm.tune_lab import trial_recipe
from clm.tune_recipe import check_writable, write_rows
from clm.tune_search import Candidate, candidates, choose, search
from data_prep.errors import UserError

ROOT = Path(__file__).parents[2]
RECIPE = """\
# A recipe with comments.
model:
  config: {config}
data:
  mixture: [{{dataset: {dataset}}}]
  block_size: 32
  tokens: 100_000
  tokens_per_step: {tokens_per_step}   # rows x tokens
  validation: []
training: {{learning_rate: 1e-2, per_device_train_batch_size: 8, seed: 3}}   # 8 rows
"""


@pytest.fixture
def recipe(tmp_path, prepared, monkeypatch):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))

    def write(tokens_per_step=1024):
        path = tmp_path / "tiny.yaml"
        text = RECIPE.format(config=config, dataset=prepared.folder, tokens_per_step=tokens_per_step)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def plan_of(path, *overrides, num_processes=1):
    return make_plan(load_recipe(path, overrides), num_processes)


def rows_of(plan):
    return [c.rows for c in candidates(plan, plan.timeline.stages[0])]


def test_candidates_divide_the_global_batch_of_the_real_run(recipe):
    # prepared blocks of 64 are 2 rows of 32; 16 blocks
    assert rows_of(plan_of(recipe())) == [2, 4, 8, 16, 32]
    assert rows_of(plan_of(recipe(), num_processes=2)) == [2, 4, 8, 16]
    # 60 blocks: powers of two, and divisors that lie apart
    assert rows_of(plan_of(recipe(60 * 64))) == [2, 4, 6, 8, 12, 20, 30, 60, 120]
    # nothing has to divide 12 blocks on 5 processes
    uneven = plan_of(recipe(12 * 64), "run.uneven_batch=true", num_processes=5)
    assert [(c.rows, c.accumulation) for c in candidates(uneven, uneven.timeline.stages[0])] == [(2, 3), (4, 2), (8, 1)]


def times(*seconds):
    """Candidates of 1, 2, 4 ... blocks and what each would take; None: out of memory."""
    found = [Candidate(2**i, 2**i, 1) for i in range(len(seconds))]
    order = []

    def measure(candidate):
        order.append(candidate.samples)
        took = seconds[found.index(candidate)]
        candidate.is_out_of_memory = took is None
        if took is not None:
            candidate.steps.append(took)

    return found, order, measure


@pytest.mark.parametrize(
    ("seconds", "start", "tried", "taken"),
    [
        ((9, 8, 7, 6, 5), 1, [2, 4, 8, 16], 16),  # upwards, to the end
        ((9, 8, 7, None, 5), 1, [2, 4, 8], 4),  # memory ends the search upwards, though the next one would fit
        ((9, 8, 8, 8, 1), 1, [2, 4, 8, 1], 2),  # two that gain nothing end it; nothing gained: downwards
        ((5, 6, 7, 8, 9), 3, [8, 16, 4, 2, 1], 1),
        ((7, 8, None, None, None), 2, [4, 2, 1], 1),  # the present one does not fit
        ((None, None, None), 1, [2, 1], None),
        ((5, 5.04, 5.2), 1, [2, 4, 1], 2),  # less than 1 % is no reason to change
        ((9, 6, 4.99, 5), 0, [1, 2, 4, 8], 4),
    ],
)
def test_the_search_goes_up_until_it_gains_nothing_and_takes_the_fastest(seconds, start, tried, taken):
    found, order, measure = times(*seconds)
    search(found, start, measure)
    assert order == tried
    best = choose([c for c in found if c.samples in tried], found[start])
    assert (best and best.samples) == taken


def test_what_lies_within_the_spread_of_the_steps_is_no_reason_to_change():
    now, other = Candidate(1, 1, 4, steps=[9, 10, 11, 12]), Candidate(2, 2, 2, steps=[9.8, 9.9, 10, 10.1])
    assert now.step_s > 1.05 * other.step_s and choose([now, other], now) is now
    now.steps = [10.4, 10.5, 10.5, 10.6]
    assert choose([now, other], now) is other


def test_a_trial_is_the_recipe_with_a_smaller_global_batch_and_nothing_written(recipe):
    plan = plan_of(recipe(), "training.gradient_checkpointing=true", "training.save_steps=7", "run.optimizer=muon")
    stage = plan.timeline.stages[0]
    found = {c.rows: c for c in candidates(plan, stage)}
    document = trial_recipe(plan, stage, found[2], 5)
    data, training = document["data"], document["training"]
    assert data["tokens_per_step"] == 4 * 2 * 32, "4 of the 16 micro-batches"
    assert training["per_device_train_batch_size"] == 2 and training["gradient_checkpointing"] is True
    assert training["save_strategy"] == "no" and "save_steps" not in training and data["validation"] == []
    assert document["run"]["optimizer"] == "muon" and document["run"]["preflight"] is False
    assert trial_recipe(plan, stage, found[32], 5)["data"]["tokens_per_step"] == 1024


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_one_value_is_written_and_nothing_else(recipe, newline):
    path = recipe()
    before = "# größer 東京 🙂\n" + path.read_text(encoding="utf-8")
    path.write_bytes(before.replace("\n", newline).encode())
    path.chmod(0o640)
    check_writable(str(path), ())
    write_rows(str(path), 16)
    after = before.replace("per_device_train_batch_size: 8,", "per_device_train_batch_size: 16,")
    assert path.read_bytes() == after.replace("\n", newline).encode() and after != before
    assert path.stat().st_mode & 0o777 == 0o640 and not list(path.parent.glob(".*tuned"))


def test_what_cannot_be_written_is_refused_before_anything_is_measured(recipe, capsys):
    path = recipe()
    assert main(["tune", str(path), "training.seed=4", "--write"]) == 2
    assert "--write is given together with training.seed=4" in capsys.readouterr().err
    shared = path.read_text().replace("batch_size: 8, seed: 3", "batch_size: &n 8, seed: *n")
    path.write_text(shared)
    assert main(["tune", str(path), "--write"]) == 2
    assert "is not written there as a number of its own" in capsys.readouterr().err
    assert path.read_text() == shared
    path.write_text(path.read_text() + "resolved: {}\n")
    with pytest.raises(UserError, match="is the record of a run"):
        check_writable(str(path), ())


def test_mistakes_are_one_message(recipe, capsys):
    assert main(["tune", str(recipe()), "--processes", "3"]) == 2
    assert "must be a multiple of 8 rows x 32 tokens x 3 processes" in capsys.readouterr().err
    assert main(["tune", str(recipe()), f"training.deepspeed={ROOT}/ds_configs/zero2.json"]) == 2
    assert "tune measures one device that holds the whole model" in capsys.readouterr().err


@pytest.mark.slow
def test_make_tune_finds_a_micro_batch_and_changes_one_value(recipe, run_cli, tmp_path):
    path = recipe(512)
    before = path.read_text()
    result = run_cli(["-m", "clm", "tune", path, "--steps", "2", "--write"], env={"OMP_NUM_THREADS": "1"})
    assert result.code == 0, result.stderr
    assert "512 tokens per step on 1 process" in result.stdout
    table = {int(r): int(n) for r, n in re.findall(r"^ +(\d+) +(\d+) +[\d,]+ +± [\d.]+% ", result.stdout, re.MULTILINE)}
    assert set(table) <= {2, 4, 8, 16} and 8 in table and all(n == 16 // r for r, n in table.items())
    chosen = int(re.search(r"^training\.per_device_train_batch_size: (\d+)$", result.stdout, re.MULTILINE)[1])
    assert chosen in table
    assert path.read_text() == before.replace("batch_size: 8,", f"batch_size: {chosen},")
    assert yaml.safe_load(path.read_text())["training"]["per_device_train_batch_size"] == chosen
    assert not list((tmp_path / "runs").glob(".*")), "nothing is left"


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_DATA")
def test_a_micro_batch_that_does_not_fit_is_found_out_and_a_smaller_one_named(recipe, run_cli):
    """The allocator itself refuses: logits of 2^16 tokens x 384 are 100 MB in fp32, and there are several."""
    path = recipe(2**16)
    used = run_cli(["-c", IMPORTS_AND_PRINTS_VMDATA], env={"OMP_NUM_THREADS": "1"})
    assert used.code == 0, used.stderr
    limit = int(used.stdout.split()[-1]) + 300_000  # kB
    words = [str(path), "run.loss=whole", "training.per_device_train_batch_size=512", "--steps", "1"]
    script = f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({limit} * 1024,) * 2)\n"
    script += f"from clm.__main__ import main; raise SystemExit(main(['tune', *{words!r}]))"
    result = run_cli(["-c", script], env={"OMP_NUM_THREADS": "1"})
    assert result.code == 0, result.stderr
    assert re.search(r"^ +512 +4 +out of memory  the recipe's$", result.stdout, re.MULTILINE), result.stdout
    chosen = int(re.search(r"^training\.per_device_train_batch_size: (\d+)$", result.stdout, re.MULTILINE)[1])
    assert chosen < 512 and "The recipe's 512 does not fit." in result.stdout
    assert not re.search(r"^ +(1,024|2,048) ", result.stdout, re.MULTILINE), "nothing larger was tried"


IMPORTS_AND_PRINTS_VMDATA = """
import clm.tune_trial, transformers.models.llama.modeling_llama
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmData:")))
"""
