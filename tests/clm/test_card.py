import json

import pytest
import yaml
from huggingface_hub import ModelCard

from clm.card import hub_licence, write_card
from clm.run_folder import read_recipe


def change(run, **sections):
    recipe = read_recipe(run)
    for name, values in sections.items():
        recipe[name] = {**recipe[name], **values}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (["CC0-1.0"], "cc0-1.0"),
        (["ODC-By-1.0", "odc-by"], "odc-by"),
        (["cc0-1.0", "mit"], None),
        (["cc0-1.0", None], None),
        (["PSF-2.0"], None),
        ([], None),
    ],
)
def test_a_licence_is_named_only_when_all_data_shares_one_that_the_hub_knows(licences, expected):
    assert hub_licence(licences) == expected


def test_the_header_is_the_hubs_and_the_body_has_the_runs_own_numbers(run_copy):
    path = write_card(run_copy, run_copy / "final")
    card = ModelCard.load(path)
    header, text = card.data, path.read_text(encoding="utf-8")
    assert (header.license, header.library_name, header.pipeline_tag) == ("cc0-1.0", "transformers", "text-generation")
    assert header.base_model is None and header.language is None and header.datasets is None
    recipe = read_recipe(run_copy)
    count = recipe["resolved"]["num_parameters"]
    assert f"{count:,} ({count / 1e6:.2f} x 10^6, {count / 2**20:.2f} x 2^20) parameters" in text
    evaluation = json.loads((run_copy / "metrics.jsonl").read_text().splitlines()[-2])
    row = next(line for line in text.splitlines() if line.startswith("| tiny | ") and "100.00%" not in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == f"{evaluation['eval_loss']:.4f}" and cells[3] == f"{evaluation['eval_bits_per_byte']:.4f}"
    assert cells[4:] == [f"{evaluation['eval_num_tokens']:,}", f"{evaluation['eval_num_bytes']:,}"]
    assert {result.metric_type: result.metric_value for result in header.eval_results}["loss"] == evaluation[
        "eval_loss"
    ]
    for line in (
        "| Tokens | 6,400 |",
        "| Steps | 10 of 10 |",
        "| Training time | 5 s |",
        "| Tokens per second | 1,219 |",
    ):
        assert line in text
    assert "![Training and validation loss over tokens](curve.svg)" in text
    assert (run_copy / "final" / "curve.svg").read_bytes() == (run_copy / "curve.svg").read_bytes()
    assert "not measured" not in text and "None" not in text and "not finished" not in text


def test_what_was_not_measured_is_said_or_left_out_and_never_invented(run_copy):
    (run_copy / "metrics.jsonl").unlink()
    change(run_copy, training={"optim": None}, resolved={"git_commit": None, "versions": {}})
    text = write_card(run_copy, run_copy / "final").read_text()
    assert "Not measured: the run has no evaluation." in text
    assert "| Training time | not measured |" in text and "| Optimizer |" not in text and "Git commit" not in text
    assert "curve.svg" not in text and "None" not in text
    assert "The run has not finished" in text


def test_no_token_of_the_recipe_or_the_environment_gets_into_the_card(run_copy, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_environment0000000000000000000000")
    change(run_copy, training={"hub_token": "hf_recipe000000000000000000000000000"})
    write_card(run_copy, run_copy / "final")
    assert not any(
        b"hf_recipe" in f.read_bytes() or b"hf_env" in f.read_bytes() for f in (run_copy / "final").iterdir()
    )


def test_a_continued_model_names_its_base_and_leaves_the_licence_to_it(run_copy):
    change(run_copy, resolved={"init": "TinyLlama/TinyLlama_v1.1"})
    path = write_card(run_copy, run_copy / "final")
    header = ModelCard.load(path).data
    assert header.base_model == "TinyLlama/TinyLlama_v1.1" and header.license == "other"
    assert "that of the base model and of the data" in path.read_text()
    change(run_copy, resolved={"init": "/home/me/private/base"})
    text = write_card(run_copy, run_copy / "final").read_text()
    assert "continued from the local model base" in text and "/home/me" not in text


def test_several_validation_sets_have_a_row_each_and_one_for_all(run_copy):
    change(run_copy, resolved={"validation": [{"name": "a"}, {"name": "b"}]})
    evaluation = {"step": 10, "tokens": 6400, "eval_loss": 3.0, "eval_a_loss": 2.0, "eval_b_loss": 4.0}
    (run_copy / "metrics.jsonl").write_text(json.dumps(evaluation) + "\n")
    text = write_card(run_copy, run_copy / "final").read_text()
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith(("| a |", "| b |", "| all |"))]
    assert [[cell.strip() for cell in row] for row in rows] == [["a", "2.0000"], ["b", "4.0000"], ["all", "3.0000"]]
