"""Recipes are read strictly: every mistake is named with file, line, key, value and remedy, all at once."""

import pytest

from clm.arguments import check_training
from clm.problems import RecipeError
from clm.recipe import load_recipe

GOOD = """\
model:
  config: model_configs/llama_demo.json
data:
  mixture: [{dataset: stdlib, weight: 1.0}]
  block_size: 256
  tokens: 2M
  tokens_per_step: 4_096
training:
  per_device_train_batch_size: 16
  learning_rate: 3e-4
"""


@pytest.fixture
def recipe_file(tmp_path):
    def write(text):
        path = tmp_path / "r.yaml"
        path.write_text(text)
        return path

    return write


def problems_of(path, *overrides):
    """All that is said about a recipe."""
    with pytest.raises(RecipeError) as caught:
        recipe = load_recipe(path, overrides)
        check_training(recipe)
        recipe.problems.raise_if_any()
    return str(caught.value)


def test_a_good_recipe_is_read_with_numbers_as_people_write_them(recipe_file):
    recipe = load_recipe(recipe_file(GOOD))
    assert (recipe.data.tokens, recipe.data.tokens_per_step, recipe.data.block_size) == (2_000_000, 4096, 256)
    assert check_training(recipe)["learning_rate"] == 3e-4  # YAML 1.1 reads it as text
    assert recipe.name == "r"
    assert recipe.problems.messages == []


@pytest.mark.parametrize(
    "written, value", [("3e-4", 3e-4), ("1E5", 1e5), ("2.5e-3", 2.5e-3), ("-1e-2", -1e-2), (".5e1", 5.0)]
)
def test_a_float_with_an_exponent_is_a_number(recipe_file, written, value):
    text = GOOD + f"  weight_decay: {written}\n"
    assert load_recipe(recipe_file(text)).training["weight_decay"] == value


def test_overrides_use_the_same_grammar_and_win(recipe_file):
    recipe = load_recipe(
        recipe_file(GOOD),
        [
            "training.learning_rate=1e-3",
            "data.tokens=1B",
            "data.mixture=[{dataset: x}]",
            "training.lr_scheduler_kwargs.min_lr_rate=0.1",
        ],
    )
    assert recipe.training["learning_rate"] == 1e-3
    assert recipe.data.tokens == 10**9
    assert recipe.data.mixture[0].dataset == "x"
    assert recipe.training["lr_scheduler_kwargs"] == {"min_lr_rate": 0.1}


def test_the_written_record_of_a_recipe_reads_as_the_same_recipe(recipe_file, tmp_path):
    import yaml

    recipe = load_recipe(recipe_file(GOOD + "run:\n  samples: {prompts: [a]}\n"), ["data.tokenizer={train: 4096}"])
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(recipe.to_dict()))
    assert load_recipe(again).to_dict() == recipe.to_dict()


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ("  block_size: 256", "  blocksize: 256", ["r.yaml:5: data.blocksize is not a known key", "block_size"]),
        ("training:", "trainning:", ["r.yaml:8: trainning", "Did you mean training"]),
        ("  block_size: 256", "  block_size: 0", ["r.yaml:5: data.block_size is 0", "at least 1"]),
        ("  tokens: 2M", "  tokens: many", ["data.tokens is 'many'", "10B"]),
        ("  tokens: 2M", "  tokens: -5", ["data.tokens is -5"]),
        ("  tokens: 2M\n", "", ["data.tokens is missing"]),
        ("3e-4", "-1", ["r.yaml:10: training.learning_rate is -1", "above 0"]),
        ("3e-4", ".nan", ["training.learning_rate is nan"]),
        ("3e-4", "fast", ["training.learning_rate is 'fast'", "a number"]),
        ("  learning_rate: 3e-4", "  learning_rat: 3e-4", ["training.learning_rat is not a", "learning_rate"]),
        ("  learning_rate: 3e-4", "  lr_scheduler_type: cosin", ["training.lr_scheduler_type is 'cosin'", "cosine"]),
        ("  learning_rate: 3e-4", "  optim: adam", ["training.optim is 'adam'", "Did you mean"]),
        ("  learning_rate: 3e-4", "  max_steps: 5", ["training.max_steps cannot be set", "data.tokens"]),
        ("  learning_rate: 3e-4", "  hub_token: hf_x", ["training.hub_token cannot be set", "HF_TOKEN"]),
        ("  learning_rate: 3e-4", "  save_steps: 0", ["training.save_steps is 0", "above 0"]),
        ("  learning_rate: 3e-4", "  eval_strategy: epoch", ["training.eval_strategy is 'epoch'", "steps"]),
        ("  learning_rate: 3e-4", "  per_device_train_batch_size: 2", ["is given twice (first in line 9)"]),
        ("weight: 1.0", "weight: 0", ["data.mixture[0].weight is 0", "above 0"]),
        ("weight: 1.0", "wieght: 1.0", ["data.mixture[0].wieght is not a known key", "weight"]),
        ("[{dataset: stdlib, weight: 1.0}]", "stdlib", ["data.mixture is 'stdlib'", "list"]),
        (
            "llama_demo.json",
            "llama_demoo.json",
            ["model.config is 'model_configs/llama_demoo.json'", "does not exist", "llama_demo.json"],
        ),
        ("model:\n", "model:\n  attention: flash\n", ["model.attention is 'flash'", "flash_attention_2"]),
        ("model:\n", "model:\n  init: ./nowhere\n", ["model.init is './nowhere'", "does not exist"]),
        ("training:\n", "training:\n  run_name: a/b\n", ["training.run_name is 'a/b'", "plain folder name"]),
        ("training:\n", "training:\n  bf16: maybe\n", ["training.bf16 is 'maybe'", "true or false"]),
        ("training:\n", "training:\n  adam_beta2: 1\n", ["training.adam_beta2 is 1", "below 1"]),
    ],
)
def test_a_mistake_is_named_with_its_remedy(recipe_file, old, new, expected):
    assert old in GOOD
    text = problems_of(recipe_file(GOOD.replace(old, new)))
    for part in expected:
        assert part in text


@pytest.mark.parametrize(
    "content, expected",
    [
        ("", "is empty"),
        ("- a\n- b\n", "not a mapping"),
        ("model: [\n", "not valid YAML"),
        ("model: 5\ntraining: {}\n", "model is 5"),
        (b"\xff\xfe\x00", "UTF-8"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path, content, expected):
    path = tmp_path / "r.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert expected in problems_of(path)


def test_a_missing_recipe_shows_those_there_are(tmp_path):
    assert "recipes/demo.yaml" in problems_of("recipes/dmo.yaml")
    assert "is a folder" in problems_of(tmp_path)


def test_all_problems_are_told_at_once(recipe_file):
    text = problems_of(
        recipe_file(GOOD.replace("3e-4", "-1").replace("block_size: 256", "blok_size: 256")),
        "run.smples={}",
        "training.seed=x",
        "nonsense",
    )
    for part in (
        "learning_rate is -1",
        "data.blok_size",
        "run.smples",
        "command line: training.seed is 'x'",
        "'nonsense'",
    ):
        assert part in text
    assert len(text.splitlines()) >= 5


def test_every_derived_key_is_one_that_trainer_knows_in_some_supported_version():
    from dataclasses import fields

    from transformers import TrainingArguments

    from clm.arguments import DEFAULTS, DERIVED, RANGES

    known = {f.name for f in fields(TrainingArguments)}
    assert set(DEFAULTS) | set(RANGES) <= known
    assert set(DERIVED) <= known
