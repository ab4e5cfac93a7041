"""docs/train.md has every key of a recipe with its default, and every key that is named anywhere exists."""

from __future__ import annotations

import dataclasses
import re

import pytest
from test_readme import PAGES, ROOT, code, page_id

from clm import recipe_sections as sections_module
from clm.arguments import DEFAULTS, DERIVED

NOT_KEYS = {"model.safetensors"}  # a file


def recipe_keys() -> set[str]:
    """Every key of the code's sections, those of list entries as `data.mixture[].weight`."""
    inner = {
        "data.mixture": ("[]", sections_module.MixtureItem),
        "data.stages": ("[]", sections_module.StageItem),
        "data.validation": ("[]", sections_module.ValidationItem),
        "run.samples": ("", sections_module.SampleSettings),
        "run.retention": ("", sections_module.Retention),
        "run.spikes": ("", sections_module.SpikeSettings),
        "run.muon": ("", sections_module.MuonSettings),
        "run.ema": ("", sections_module.EmaSettings),
    }
    keys = set()
    for section in ("model", "data", "run"):
        for item in dataclasses.fields(getattr(sections_module, f"{section.title()}Section")):
            key = f"{section}.{item.name}"
            mark, entry = inner.get(key, ("", None))
            keys |= {f"{key}{mark}.{sub.name}" for sub in dataclasses.fields(entry)} if entry else set()
            keys |= {key} if mark or not entry else set()
    return keys


def documented_keys() -> set[str]:
    text = (ROOT / "docs/train.md").read_text(encoding="utf-8")
    return set(re.findall(r"^\| `((?:model|data|run|training)\.[^`]+)` \|", text, flags=re.MULTILINE))


def test_the_tables_of_train_md_are_the_keys_of_the_code():
    assert {key for key in documented_keys() if not key.startswith("training.")} == recipe_keys()
    required = {"training.learning_rate", "training.per_device_train_batch_size"}
    expected = {f"training.{name}" for name in (*DERIVED, *DEFAULTS)} | required
    assert {key for key in documented_keys() if key.startswith("training.")} == expected


def test_the_defaults_of_train_md_are_those_of_the_code():
    text = (ROOT / "docs/train.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| `([a-z_.\[\]]+)` \| `([^`]+)` \|", text, flags=re.MULTILINE))
    sections = {
        "model": sections_module.ModelSection(),
        "data": sections_module.DataSection(),
        "run": sections_module.RunSection(),
        "run.samples": sections_module.SampleSettings(),
        "run.retention": sections_module.Retention(),
        "run.spikes": sections_module.SpikeSettings(),
        "run.muon": sections_module.MuonSettings(),
        "run.ema": sections_module.EmaSettings(),
    }
    real = {f"{name}.{key}": value for name, section in sections.items() for key, value in vars(section).items()}
    real |= {f"training.{key}": value for key, value in DEFAULTS.items()} | {"data.mixture[].weight": 1.0}
    assert len(shown) >= 15
    for key, value in shown.items():
        assert str(real[key]) in (value, value.capitalize()), key


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_every_key_that_is_named_anywhere_exists(path):
    from transformers import TrainingArguments

    known = recipe_keys() | {f"training.{field.name}" for field in dataclasses.fields(TrainingArguments)} | NOT_KEYS
    known |= {
        "run.samples",
        "run.retention",
        "run.spikes",
        "run.muon",
        "run.ema",
        "training.lr_scheduler_kwargs.num_decay_steps",
    }
    for key in re.findall(r"(?<![\w./])(?:model|data|run|training)\.[a-z_]+(?:\[\]\.[a-z_]+|\.[a-z_]+)?\b", code(path)):
        assert key in known, key
