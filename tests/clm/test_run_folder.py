import json

import pytest

from clm.run_folder import (
    find_run,
    last_evaluation,
    list_checkpoints,
    model_folder,
    read_metrics,
    read_recipe,
    tokenizer_folder,
)
from data_prep.errors import UserError


def make_checkpoint(run, step, is_complete=True):
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    if is_complete:
        (folder / "checkpoint.json").write_text("{}")
    return folder


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "demo"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("training:\n  learning_rate: 3e-4\n")
    return folder


def test_a_bare_name_lies_under_runs_dir_and_a_path_is_a_path(run, monkeypatch, tmp_path):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    assert find_run("demo") == run
    monkeypatch.delenv("RUNS_DIR")
    assert find_run(run) == run
    assert find_run(str(run)) == run


def test_a_misspelt_run_is_answered_with_the_nearest_and_the_command_that_makes_one(run, monkeypatch, tmp_path):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    with pytest.raises(UserError, match="Did you mean .*runs/demo.*make train RECIPE="):
        find_run("dmo")
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match="no run in .*elsewhere yet.*make demo"):
        find_run("demo")
    (tmp_path / "elsewhere" / "x").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no recipe.yaml"):
        find_run("x")


def test_a_recipe_without_resolved_section_has_an_empty_one_and_3e_4_is_a_number(run):
    assert read_recipe(run) == {"resolved": {}, "training": {"learning_rate": 3e-4}}


def test_a_torn_last_line_of_the_metrics_is_left_out_and_any_other_is_an_error(run):
    assert read_metrics(run) == []
    path = run / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "eval_loss": 3.5}\n{"step": 3, "lo')
    assert read_metrics(run) == [{"step": 1}, {"step": 2, "eval_loss": 3.5}]
    assert last_evaluation(read_metrics(run)) == {"step": 2, "eval_loss": 3.5}
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 1 is not a JSON object"):
        read_metrics(run)


def test_checkpoints_are_sorted_by_number_and_incomplete_ones_are_left_out(run):
    for step in (1000, 200, 30):
        make_checkpoint(run, step)
    make_checkpoint(run, 2000, is_complete=False)
    (run / "checkpoint-best").mkdir()
    assert [step for step, _ in list_checkpoints(run)] == [30, 200, 1000]


def test_a_missing_final_names_the_newest_checkpoint_and_how_to_use_it(run):
    with pytest.raises(UserError, match="no checkpoint yet"):
        model_folder(run)
    folder = make_checkpoint(run, 200)
    with pytest.raises(UserError, match="step 200; use it with: --checkpoint 200"):
        model_folder(run)
    assert model_folder(run, 200) == folder
    with pytest.raises(UserError, match="no complete checkpoint of step 5. Complete checkpoints: 200"):
        model_folder(run, 5)


def test_a_checkpoint_without_weights_is_refused_as_a_model(run):
    folder = make_checkpoint(run, 200)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no .*safetensors, so it cannot be loaded as a model"):
        model_folder(run, 200)


def test_a_tokenizer_is_taken_from_the_dataset_where_the_model_folder_has_none(run, tmp_path):
    folder, dataset = make_checkpoint(run, 200), tmp_path / "data" / "x"
    (run / "recipe.yaml").write_text(json.dumps({"resolved": {"datasets": [{"folder": str(dataset)}]}}))
    with pytest.raises(UserError, match="no tokenizer found"):
        tokenizer_folder(run, folder)
    (dataset / "tokenizer").mkdir(parents=True)
    (dataset / "tokenizer" / "tokenizer_config.json").write_text("{}")
    assert tokenizer_folder(run, folder) == dataset / "tokenizer"
    (folder / "tokenizer_config.json").write_text("{}")
    assert tokenizer_folder(run, folder) == folder
