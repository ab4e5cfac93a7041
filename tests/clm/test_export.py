import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

from clm import export
from clm.export import export_model
from data_prep.errors import UserError


def test_both_gives_the_language_model_and_the_base_model_each_complete(run_copy):
    base, lm = export_model(run_copy, None, "both", None, "float32")
    assert (base, lm) == (run_copy / "export" / "base", run_copy / "export" / "lm")
    for folder in (base, lm):
        names = {path.name for path in folder.iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= names
    assert (lm / "generation_config.json").is_file()
    ids = AutoTokenizer.from_pretrained(lm)("The river carries", return_tensors="pt")["input_ids"]
    source = AutoModelForCausalLM.from_pretrained(run_copy / "final")
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(lm)(ids).logits, source(ids).logits)
        hidden = source.model(ids).last_hidden_state
        assert torch.equal(AutoModel.from_pretrained(base)(ids).last_hidden_state, hidden)
    with safe_open(base / "model.safetensors", "pt") as weights:
        names = weights.keys()
        assert not any("lm_head" in name for name in names)
    assert "AutoModel.from_pretrained" in (base / "README.md").read_text()
    assert "AutoModelForCausalLM.from_pretrained" in (lm / "README.md").read_text()


def test_a_pipeline_takes_the_exported_language_model(run_copy, tmp_path):
    (folder,) = export_model(run_copy, None, "lm", tmp_path / "lm", "float32")
    result = pipeline("text-generation", model=str(folder), device="cpu")(
        "The river", max_new_tokens=5, do_sample=False
    )
    assert result[0]["generated_text"].startswith("The river")


def test_bfloat16_and_a_checkpoint_can_be_exported(run_copy, tmp_path):
    (folder,) = export_model(run_copy, 10, "lm", tmp_path / "half", "bfloat16")
    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = weights.keys()
        assert {weights.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert "| Weights stored as | bfloat16 |" in (folder / "README.md").read_text()


def test_a_folder_that_is_not_empty_is_left_alone(run_copy, tmp_path):
    (tmp_path / "out" / "base").mkdir(parents=True)
    (tmp_path / "out" / "base" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty. Nothing is overwritten"):
        export_model(run_copy, None, "both", tmp_path / "out", "float32")
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["base", "mine.txt"]


def test_weights_that_changed_on_the_way_are_found(run_copy):
    model = AutoModelForCausalLM.from_pretrained(run_copy / "final").eval()
    with torch.no_grad():
        model.model.norm.weight[0] += 0.01
    with pytest.raises(UserError, match="computes other numbers than the run's"):
        export._check_same_numbers(model, run_copy / "final", "lm")
