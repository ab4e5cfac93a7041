"""Models start where the recipe says: weights from (config, seed) alone, fp32 masters, the tokenizer's own ids."""

import json
import math
from pathlib import Path

import pytest
import torch

from clm.model import build_model, check_model, draw_weights, load_config
from clm.problems import Problems
from clm.recipe_sections import ModelSection
from data_prep.errors import UserError

TINY = {
    "model_type": "llama",
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def tokenizer(prepared):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(prepared.folder / "tokenizer")


@pytest.fixture
def config_file(tmp_path):
    def write(**changes) -> str:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({k: v for k, v in {**TINY, **changes}.items() if v is not None}))
        return str(path)

    return write


def build(path: str, tokenizer, seed: int = 1, scaled: bool = False):
    section = ModelSection(config=path, scaled_init=scaled)
    return build_model(section, load_config(path), tokenizer, "sdpa", seed)


def test_weights_are_a_pure_function_of_config_and_seed(config_file, tokenizer):
    first = build(config_file(), tokenizer).state_dict()
    torch.manual_seed(999)  # what happened before in the process does not matter
    torch.rand(7)
    again = build(config_file(), tokenizer).state_dict()
    other = build(config_file(), tokenizer, seed=2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.layers.0.mlp.up_proj.weight"], other["model.layers.0.mlp.up_proj.weight"])


def test_weights_have_the_documented_distribution(config_file, tokenizer):
    plain = build(config_file(initializer_range=0.05), tokenizer)
    scaled = build(config_file(initializer_range=0.05), tokenizer, scaled=True)
    for name, parameter in plain.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        assert parameter.std().item() == pytest.approx(0.05, rel=0.05), name
        ratio = (dict(scaled.named_parameters())[name].std() / parameter.std()).item()
        is_scaled = name.endswith(("o_proj.weight", "down_proj.weight"))
        assert ratio == pytest.approx(1 / math.sqrt(2 * 2) if is_scaled else 1.0, rel=1e-5), name


def test_tied_weights_stay_tied_and_special_ids_are_the_tokenizers(config_file, tokenizer):
    model = build(config_file(tie_word_embeddings=True), tokenizer)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (0, 1, 2)
    assert model.generation_config.eos_token_id == 1


def test_a_mixture_of_experts_is_drawn_too(tokenizer):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_local_experts=4,
    )
    one, two = MixtralForCausalLM(config), MixtralForCausalLM(config)
    for model in (one, two):
        draw_weights(model, 3, scaled=False)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"hiden_size": 64}, "hiden_size is not a key of LlamaConfig. Did you mean hidden_size"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16' but weights are always trained as fp32 masters"),
        ({"torch_dtype": "bfloat16"}, "torch_dtype is 'bfloat16'"),
        ({"model_type": "lama"}, "model_type is 'lama'"),
        ({"num_attention_heads": 5}, "LlamaConfig refuses it"),
    ],
)
def test_a_config_with_a_mistake_is_refused(config_file, changes, expected):
    with pytest.raises(UserError) as caught:
        load_config(config_file(**changes))
    assert expected in str(caught.value)


def test_a_config_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        load_config(str(tmp_path / "c.json"))


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, None),
        ({"vocab_size": 448}, None),  # padded to a multiple of 64
        ({"vocab_size": 300}, "Ids above 299 would have no embedding"),
        ({"vocab_size": 50_000}, "49616 rows would never be trained"),
    ],
)
def test_model_and_tokenizer_must_fit(config_file, tokenizer, changes, expected):
    path = config_file(**changes)
    problems = Problems("r.yaml", {})
    check_model(ModelSection(config=path), load_config(path), tokenizer, "data/x", problems)
    assert (expected is None and not problems.messages) or expected in "\n".join(problems.messages)


def test_a_base_model_with_another_tokenizer_is_refused(config_file, tokenizer, prepared, tmp_path):
    from transformers import PreTrainedTokenizerFast

    def problems_with(folder: Path) -> str:
        problems = Problems("r.yaml", {})
        config = load_config(config_file())
        check_model(ModelSection(init=str(folder)), config, tokenizer, "data/x", problems)
        return "\n".join(problems.messages)

    same = tmp_path / "same"
    tokenizer.save_pretrained(same)
    assert problems_with(same) == ""
    raw = json.loads((prepared.folder / "tokenizer" / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    a, b = list(vocabulary)[50], list(vocabulary)[51]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (tmp_path / "swapped.json").write_text(json.dumps(raw))
    other = tmp_path / "other"
    PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "swapped.json"), eos_token="[EOT]").save_pretrained(other)
    assert "is not the one data/x was prepared with" in problems_with(other)
    (tmp_path / "empty").mkdir()
    assert "has no tokenizer to compare with" in problems_with(tmp_path / "empty")
