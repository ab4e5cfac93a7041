"""`verify` by the command a user types: certificates of shipped recipes, the card, what a difference looks like."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from clm.certificate import describe, order_sha256
from clm.plan import make_plan
from clm.recipe import load_recipe
from clm.replay import open_replay
from clm.verify import compare
from clm.verify_recipe import load_copy, plan_whole, write_copies

ROOT = Path(__file__).parents[2]

RECIPE = """\
model:
  config: {config}
data:
  mixture: [{{dataset: {first}, tokens: 30_000}}, {{dataset: {second}, tokens: 10_000}}]
  block_size: 32
  tokens_per_step: 512
  validation: [{{dataset: {first}, tokens: 2048}}]
training:
  per_device_train_batch_size: 8
  learning_rate: 1e-2
  lr_scheduler_type: warmup_stable_decay
  lr_scheduler_kwargs: {{num_decay_steps: 20, min_lr_ratio: 0.1}}
  warmup_steps: 10
  logging_steps: 1
  seed: 3
"""
CONFIG = {
    "model_type": "llama",
    "vocab_size": 384,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def recipe(tmp_path: Path, prepared, second_dataset, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    path = tmp_path / "mixed.yaml"
    path.write_text(RECIPE.format(config=config, first=prepared.folder, second=second_dataset))
    return path


@pytest.fixture(scope="session")
def named_data(tmp_path_factory, prepared, run_cli) -> Path:
    """A DATA_DIR with the datasets that the two stage recipes name, small and of one tokenizer."""
    folder = tmp_path_factory.mktemp("named_data")
    for name, block_size in (("fineweb", 2048), ("fineweb-edu-10bt/low", 512), ("fineweb-edu-10bt/high", 512)):
        corpus = folder.with_name(f"corpus-{block_size}-{name.rpartition('/')[2]}")
        corpus.mkdir()
        for i, path in enumerate(sorted(prepared.corpus.glob("*.txt"))):
            (corpus / f"{i}.txt").write_text((path.read_text(encoding="utf-8") + name) * 8, encoding="utf-8")
        prep = ["prep", corpus, "--tokenizer", prepared.tokenizer, "--block-size", str(block_size)]
        result = run_cli(["-m", "data_prep", *prep, "--out", folder / name, "--val-fraction", "0.4"])
        assert result.code == 0, result.stderr
    return folder


def test_a_small_copy_keeps_shares_seeds_and_proportions(recipe, tmp_path, prepared, second_dataset):
    whole = plan_whole(load_recipe(recipe))
    copies = write_copies(whole, tmp_path, num_steps=24, num_processes=2)
    copy = load_copy(copies[True], "copy")
    assert (copy.num_steps, copy.timeline.stages[0].samples_per_step) == (24, 4)
    assert [float(share) for share in copy.timeline.stages[0].shares] == [0.75, 0.25]
    assert (copy.data_seed, list(copy.recipe.data.datasets)) == (3, [str(prepared.folder), str(second_dataset)])
    # 79 steps with warm-up 10 and decay 20 become 24 with 4 and 6
    rates, whole_rates = copy.learning_rate_factor(), whole.learning_rate_factor()
    assert [rates(0), rates(4), rates(17), rates(18)] == [0.1, 1, 1, 1] and rates(23) < 0.3
    assert [whole_rates(0), whole_rates(10), whole_rates(58)] == [0.1, 1, 1] and whole_rates(78) < 0.2
    assert json.loads((tmp_path / "tiny.json").read_text())["attention_dropout"] == 0.1
    assert json.loads((tmp_path / "tiny-without-dropout.json").read_text())["attention_dropout"] == 0.0


@pytest.mark.slow
def test_a_mixture_is_certified_in_the_card_of_its_run_until_the_recipe_changes(recipe, run_cli):
    named = "training.run_name=certified"
    result = run_cli(["-m", "clm", "verify", recipe, named, "--kills", "2", "--seed", "1"])
    assert result.code == 0, result.stdout + result.stderr
    run = Path(os.environ["RUNS_DIR"]) / "certified"
    certificate = json.loads((run / "certificate.json").read_text())
    assert certificate["passed"] and len(certificate["kills"]) >= 3 and len(certificate["checks"]) == 11
    assert describe(certificate) in result.stdout and describe(certificate) in (run / "certificate.txt").read_text()
    assert sorted(p.name for p in run.iterdir()) == ["certificate.json", "certificate.txt"]

    assert run_cli([ROOT / "run_clm.py", recipe, named]).code == 0
    assert describe(certificate) in (run / "final" / "README.md").read_text()
    replay = open_replay(run)
    assert certificate["order_sha256"] == order_sha256(replay), "that of the run itself"
    record = yaml.safe_load((run / "recipe.yaml").read_text())
    record["training"]["weight_decay"] = 0.5
    (run / "recipe.yaml").write_text(yaml.safe_dump(record))
    assert run_cli(["-m", "clm", "card", run]).code == 0
    assert "certificate" not in (run / "final" / "README.md").read_text(), "it is of another recipe"


@pytest.mark.slow
@pytest.mark.parametrize("name, stages", [("llama_170m_short_long", 3), ("llama_170m_low_high", 3)])
def test_the_shipped_recipes_with_stages_are_certified(name, stages, named_data, prepared, tmp_path, run_cli):
    config = json.loads((ROOT / "model_configs" / "llama_170m.json").read_text())
    own = tmp_path / "llama_170m.json"  # but for the vocabulary
    own.write_text(json.dumps({**config, "vocab_size": 384}))
    overrides = [f"model.config={own}", f"data.tokenizer={prepared.tokenizer}", "data.max_epochs=1e12"]
    env = {"DATA_DIR": str(named_data), "RUNS_DIR": str(tmp_path)}
    command = ["-m", "clm", "verify", ROOT / "recipes" / f"{name}.yaml", *overrides, "--kills", "2", "--steps", "18"]
    result = run_cli(command, env=env, timeout_s=1200)
    assert result.code == 0, result.stdout + result.stderr
    certificate = json.loads((tmp_path / name / "certificate.json").read_text())
    assert len(certificate["stages"]) == stages
    if name == "llama_170m_short_long":
        sizes = [(s["block_size"], s["tokens_per_step"] // s["block_size"]) for s in certificate["stages"]]
        assert sizes == [(512, 16), (1024, 16), (2048, 8)], "rows in proportion: 262,144, then 524,288 tokens"


@pytest.mark.slow
def test_a_difference_is_found_and_named(recipe, tmp_path, run_cli):
    """The four runs of a verification, of which one is changed afterwards."""
    runs = tmp_path / "four"
    whole = plan_whole(load_recipe(recipe))
    copies = write_copies(whole, tmp_path, num_steps=6, num_processes=2)
    env = {"RUNS_DIR": str(runs)}
    for name, dropout in (("straight", True), ("quiet", False)):
        result = run_cli([ROOT / "run_clm.py", copies[dropout], f"training.run_name={name}"], env=env)
        assert result.code == 0, result.stderr
    for name, like in (("killed", "straight"), ("moved", "quiet")):
        shutil.copytree(runs / like, runs / name)
    plan = load_copy(copies[True], "straight")
    assert all(check.passed for check in compare(runs, plan))

    def failed() -> list[str]:
        return [f"{check.run}: {check.what}: {check.result}" for check in compare(runs, plan) if not check.passed]

    metrics = runs / "moved" / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    records[4]["loss"] += 2e-5
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert failed() == ["moved: loss of each step: largest difference 2.0e-05, allowed 1e-05"]
    blocks = runs / "killed" / "blocks-0.jsonl"
    blocks.write_text(blocks.read_text().replace('"samples": [4, 5, 6, 7]', '"samples": [4, 5, 6, 8]'))
    assert "killed: blocks and tokens of each step: DIFFERENT from step 2 on" in failed()[0]
    model = runs / "killed" / "final" / "model.safetensors"
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    assert "killed: final weights: DIFFERENT" in failed()


@pytest.mark.slow
def test_what_cannot_be_verified_is_one_message(recipe, run_cli, tmp_path):
    result = run_cli(["-m", "clm", "verify", recipe, "training.learning_rates=3"])
    assert result.code == 2 and "training.learning_rates" in result.stderr and "Traceback" not in result.stderr
    result = run_cli(["-m", "clm", "verify", recipe, "data.mixture=[{dataset: not-there}]"])
    assert result.code == 2 and "not-there" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "runs" / "mixed").exists()
    assert make_plan(load_recipe(recipe), 1).num_steps == 79
