"""model_configs/*.json: exact sizes, no key that does nothing, and README's table."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

FOLDER = Path(__file__).resolve().parent.parent / "model_configs"
NUM_PARAMETERS = {
    "llama_demo": 1_311_872,
    "llama_20m": 20_453_760,
    "llama_170m": 179_448_576,
    "llama_437m": 437_584_896,
    "llama_437m_hd128": 437_584_896,
    "tinyllama_1.1b": 1_100_048_384,
    "llama2_7b": 6_738_415_616,
    "mixtral_1.6b": 1_580_436_480,
}
# These select and describe a class and are no fields of it.
CLASS_KEYS = {"model_type", "architectures"}
# dtype makes weights be born in bf16 without fp32 masters; the tokenizer of the data decides the control tokens.
FORBIDDEN_KEYS = {"dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "rope_theta", "rope_scaling"}


def read_config(name: str) -> PreTrainedConfig:
    return AutoConfig.from_pretrained(FOLDER / f"{name}.json")


def build_on_meta(name: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(read_config(name))


def test_every_config_has_an_expected_size():
    assert {path.stem for path in FOLDER.glob("*.json")} == set(NUM_PARAMETERS)


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_the_number_of_parameters_is_exact(name):
    assert sum(parameter.numel() for parameter in build_on_meta(name).parameters()) == NUM_PARAMETERS[name]


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_every_key_is_known_to_the_config_class(name):
    # AutoConfig takes a misspelt key without a word, and the model is another one than was meant.
    keys = json.loads((FOLDER / f"{name}.json").read_text()).keys()
    known = {field.name for field in fields(read_config(name))}
    assert keys - known - CLASS_KEYS == set()
    assert keys & FORBIDDEN_KEYS == set()


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_every_key_arrives_in_the_config(name):
    config = read_config(name)
    for key, value in json.loads((FOLDER / f"{name}.json").read_text()).items():
        assert getattr(config, key) == value, key


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_heads_divide(name):
    config = read_config(name)
    assert config.num_attention_heads * config.head_dim == config.hidden_size
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.head_dim % 2 == 0  # rotary embeddings turn pairs


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_a_config_survives_saving_and_loading(name, tmp_path):
    read_config(name).save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == read_config(name).rope_parameters
    assert again.to_diff_dict() == read_config(name).to_diff_dict()


def test_the_twin_differs_in_its_heads_only():
    plain, twin = (json.loads((FOLDER / f"llama_437m{end}.json").read_text()) for end in ("", "_hd128"))
    different = {key for key in plain.keys() | twin.keys() if plain.get(key) != twin.get(key)}
    assert different == {"num_attention_heads", "num_key_value_heads", "head_dim"}


def test_the_readme_tells_the_exact_sizes():
    rows = re.findall(r"^\| `(\S+)\.json` \|.*", (FOLDER / "README.md").read_text(), flags=re.MULTILINE)
    assert sorted(rows) == sorted(NUM_PARAMETERS)
    for row in re.findall(r"^\| `\S+\.json` \|.*", (FOLDER / "README.md").read_text(), flags=re.MULTILINE):
        name, count, millions, mebi = (cell.strip(" `") for cell in row.split("|")[1:5])
        expected = NUM_PARAMETERS[name.removesuffix(".json")]
        assert (count, millions, mebi) == (f"{expected:,}", f"{expected / 1e6:.2f}", f"{expected / 2**20:.2f}")
