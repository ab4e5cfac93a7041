"""The plan: batch and length in tokens, errors with the nearest values, and every shipped recipe."""

from pathlib import Path

import pytest

from clm.plan import make_plan
from clm.plan_text import describe_plan, learning_rates
from clm.prepare import prep_commands
from clm.problems import RecipeError
from clm.recipe import load_recipe
from data_prep.catalog import load_entry

RECIPES = sorted(Path("recipes").glob("*.yaml"))


def test_steps_and_accumulation_follow_from_tokens(plan_of):
    plan = plan_of()
    assert plan.num_steps == 20  # ceil(10,000 / 512)
    stage = plan.timeline.stages[0]
    assert plan.accumulation(stage) == 2  # 512 / (8 x 32)
    assert (stage.samples_per_step, plan.samples_per_micro_batch) == (8, 4)  # prepared blocks hold 64 tokens
    assert plan_of(num_processes=2).accumulation(stage) == 1


@pytest.mark.parametrize(
    "overrides, num_processes, expected",
    [
        (["data.tokens_per_step=500"], 1, ["data.tokens_per_step is 500", "Use 256 or 512"]),
        ([], 3, ["must be a multiple of 8 rows x 32 tokens x 3 processes = 768", "Use 768"]),
        (["training.per_device_train_batch_size=3"], 1, ["whole prepared blocks of 64 tokens (2 rows)", "Use 2 or 4"]),
        (["data.block_size=48"], 1, ["which it does not divide", "32 or 64"]),
        (["data.block_size=128"], 1, ["max_position_embeddings 64", "does not divide"]),
        (["data.tokens=1B"], 1, ["passes", "data.max_epochs is 4", "raise data.max_epochs"]),
        (["data.mixture=[{dataset: nope}]"], 1, ["data/nope does not exist", "make prep"]),
        (["data.validation=[{dataset: nope}]"], 1, ["data.validation[0] cannot be used", "nope"]),
        (["training.bf16=true", "training.fp16=true"], 1, ["training.fp16"]),
        (
            ["run.samples={prompts: [The river], max_new_tokens: 64}"],
            1,
            ["has the prompt 'The river'", "64 pos"],
        ),
        (["model.attention=flash_attention_2"], 1, ["there is no CUDA GPU"]),
        (["training.lr_scheduler_type=warmup_stable_decay"], 1, ["num_decay_steps", "is missing"]),
    ],
)
def test_what_does_not_fit_is_refused_with_the_way_out(plan_of, overrides, num_processes, expected):
    with pytest.raises(RecipeError) as caught:
        plan_of(*overrides, num_processes=num_processes)
    for part in expected:
        assert part in str(caught.value)


def test_an_interrupted_preparation_is_named(plan_of, tmp_path):
    (tmp_path / "half" / ".work").mkdir(parents=True)
    with pytest.raises(RecipeError, match="was interrupted"):
        plan_of(f"data.mixture=[{{dataset: {tmp_path}/half}}]")


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["training.lr_scheduler_type=linear", "training.warmup_steps=4"], {0: 0, 2: 5e-4, 4: 1e-3, 12: 5e-4}),
        (
            ["training.lr_scheduler_type=constant_with_warmup", "training.warmup_steps=0.5"],
            {0: 0, 5: 5e-4, 10: 1e-3, 19: 1e-3},
        ),
        (
            ["training.lr_scheduler_type=cosine_with_min_lr", "training.lr_scheduler_kwargs={min_lr_rate: 0.1}"],
            {0: 1e-3, 10: 5.5e-4, 20: 1e-4},
        ),
        (
            [
                "training.lr_scheduler_type=warmup_stable_decay",
                "training.warmup_steps=4",
                "training.lr_scheduler_kwargs={num_decay_steps: 0.2, decay_type: linear}",
            ],
            {0: 0, 4: 1e-3, 15: 1e-3, 16: 1e-3, 18: 5e-4},
        ),
    ],
)
def test_schedules_have_their_closed_forms(plan_of, overrides, expected):
    assert learning_rates(plan_of(*overrides), list(expected)) == pytest.approx(list(expected.values()))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_passes_a_dry_run(path, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    plan = make_plan(load_recipe(path), num_processes=1, dry_run=True)
    text = describe_plan(plan)
    assert f"= {plan.timeline.stages[0].tokens_per_step:,} tokens per step" in text
    assert "not checked" in text, "nothing is prepared in this folder"
    with pytest.raises(RecipeError, match="make prep RECIPE="):
        make_plan(load_recipe(path), num_processes=1)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_divides_on_1_2_4_and_8_devices(path, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    if path.stem in ("demo", "wikitext2_local"):
        return  # one device; more need another batch
    for num_processes in (2, 4, 8):
        make_plan(load_recipe(path), num_processes, dry_run=True)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_says_what_it_is(path):
    header = path.read_text().split("\nmodel:")[0]
    assert "Hardware:" in header and "Tokens:" in header and "Result:" in header
    assert f"recipes/{path.name}" in header or "make demo" in header


def test_preparing_the_demos_data_by_name_or_by_recipe_is_the_same():
    recipe, entry = load_recipe("recipes/demo.yaml"), load_entry("stdlib")
    assert recipe.data.tokenizer == f"train:{entry.default_tokenizer['train']}"
    assert recipe.data.block_size == entry.default_block_size
    [command] = prep_commands(recipe)
    assert command[:4] == ["prep", "stdlib", "--block-size", "256"]
    assert Path(command[-1]).name == "stdlib"


def test_a_second_dataset_uses_the_tokenizer_that_is_trained_on_the_first(tmp_path):
    text = Path("recipes/llama_170m.yaml").read_text()
    path = tmp_path / "two.yaml"
    path.write_text(text.replace("{dataset: fineweb, weight: 1.0}", "{dataset: fineweb}\n    - {dataset: tinystories}"))
    first, second = prep_commands(load_recipe(path))
    assert first[first.index("--tokenizer") + 1] == "train:50000"
    assert second[second.index("--tokenizer") + 1].endswith("fineweb/tokenizer")
