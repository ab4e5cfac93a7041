"""One reader per section of a recipe: each key is checked and converted, every problem is recorded.

In: the section's mapping as YAML gave it. Out: the dataclass of clm/recipe_sections.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from clm.attention import ATTENTION_CHOICES
from clm.problems import (
    Problems,
    keys_of,
    read_boolean,
    read_choice,
    read_count,
    read_mapping,
    read_not_negative,
    read_optional_count,
    read_optional_number,
    read_positive_number,
    read_text,
    refuse_unknown,
)
from clm.recipe_optimizer import read_ema, read_muon
from clm.recipe_sections import (
    DataSection,
    MixtureItem,
    ModelSection,
    Retention,
    RunSection,
    SampleSettings,
    SpikeSettings,
    StageItem,
    ValidationItem,
)
from clm.speed import LOSSES, SPEEDS
from clm.timeline import Schedule

SHAPES = ("constant", "linear", "cosine", "1-sqrt")
OPTIMIZERS = ("trainer", "muon")
SPIKE_POLICIES = ("log", "report", "skip", "rollback")
FULL_DISK_CHOICES = ("continue", "pause", "stop")
AMOUNTS = ("weight", "tokens", "epochs")


def read_model(raw: dict, problems: Problems) -> ModelSection:
    """`model:`."""
    refuse_unknown("model", raw, keys_of(ModelSection), problems)
    section = ModelSection(
        config=read_text(raw, "model.config", None, problems),
        init=read_text(raw, "model.init", "random", problems),
        attention=read_choice(raw, "model.attention", "auto", ATTENTION_CHOICES, problems),
        scaled_init=read_boolean(raw, "model.scaled_init", False, problems),
        residual_dtype=read_choice(raw, "model.residual_dtype", "fp32", ("fp32", "bf16"), problems),
        fp8=read_boolean(raw, "model.fp8", False, problems),
        rope=read_mapping(raw, "model.rope", problems),
    )
    if section.init == "random" and not section.config:
        problems.add(
            "model.config", "is missing. init: random needs an architecture, e.g. model_configs/llama_170m.json."
        )
    if section.init == "random" and section.config and not Path(section.config).is_file():
        known_configs = sorted(str(p) for p in Path("model_configs").glob("*.json"))
        problems.unknown("model.config", section.config, known_configs, f"is {section.config!r}, which does not exist")
    if section.init != "random" and section.config:
        problems.add(
            "model.config", "is set together with model.init. The checkpoint brings its own; remove model.config."
        )
    if section.init != "random" and section.scaled_init:
        problems.add("model.scaled_init", "is true but model.init names a checkpoint. Only random weights are drawn.")
    if section.init != "random" and _looks_like_path(section.init) and not Path(section.init).is_dir():
        problems.add(
            "model.init", f"is {section.init!r}, a folder that does not exist. Name one, or a Hub id user/model."
        )
    return section


def read_data(raw: dict, problems: Problems) -> DataSection:
    """`data:`."""
    refuse_unknown("data", raw, keys_of(DataSection), problems)
    stages = _read_stages(raw.get("stages"), problems)
    needs_mixture = not stages or any(stage.mixture is None for stage in stages)
    mixture = read_mixture(raw.get("mixture"), "data.mixture", problems) if needs_mixture or raw.get("mixture") else ()
    if mixture and not needs_mixture:
        problems.add("data.mixture", "is set but each stage has a mixture of its own. Remove one of them.")
    section = DataSection(
        mixture=mixture,
        stages=stages,
        tokenizer=_read_tokenizer(raw.get("tokenizer"), problems),
        block_size=read_count(raw, "data.block_size", problems),
        tokens=read_optional_count(raw, "data.tokens", problems),
        tokens_per_step=read_count(raw, "data.tokens_per_step", problems),
        validation=_read_validation(raw.get("validation"), problems),
        shuffle=read_boolean(raw, "data.shuffle", True, problems),
        document_mask=read_boolean(raw, "data.document_mask", False, problems),
        max_epochs=read_positive_number(raw, "data.max_epochs", 4.0, problems),
        permute_labels=read_boolean(raw, "data.permute_labels", False, problems),
    )
    if section.stages and section.tokens is not None:
        problems.add("data.tokens", "is set together with data.stages, whose tokens add up to the run. Remove it.")
    elif not section.stages and section.tokens is None and not _has_amounts(section.mixture):
        problems.add("data.tokens", "is missing. Write a number such as 512, 262_144, 2M or 10B.")
    for i, stage in enumerate(section.stages):
        if stage.tokens is None and not _has_amounts(section.mixture_of(stage)):
            problems.add(f"data.stages[{i}].tokens", "is missing. Write a number such as 2M or 10B.")
    if section.document_mask and section.permute_labels:
        problems.add(
            "data.document_mask", "is true together with data.permute_labels, whose labels come from anywhere."
        )
    return section


def read_run(raw: dict, problems: Problems) -> RunSection:
    """`run:`."""
    refuse_unknown("run", raw, keys_of(RunSection), problems)
    return RunSection(
        samples=_read_samples(read_mapping(raw, "run.samples", problems), problems),
        retention=_read_retention(read_mapping(raw, "run.retention", problems), problems),
        spikes=_read_spikes(read_mapping(raw, "run.spikes", problems), problems),
        speed=read_choice(raw, "run.speed", "fast", SPEEDS, problems),
        loss=read_choice(raw, "run.loss", "auto", LOSSES, problems),
        optimizer=read_choice(raw, "run.optimizer", "trainer", OPTIMIZERS, problems),
        muon=read_muon(raw, problems),
        ema=read_ema(raw, problems),
        z_loss=read_optional_number(raw, "run.z_loss", problems),
        schedule_tokens=read_optional_count(raw, "run.schedule_tokens", problems),
        warmup_tokens=read_optional_count(raw, "run.warmup_tokens", problems),
        decay_tokens=read_optional_count(raw, "run.decay_tokens", problems),
        peak_tflops=read_optional_number(raw, "run.peak_tflops", problems),
        save_in_background=read_boolean(raw, "run.save_in_background", True, problems),
        preflight=read_boolean(raw, "run.preflight", True, problems),
        full_disk=read_choice(raw, "run.full_disk", "continue", FULL_DISK_CHOICES, problems),
        record_blocks=read_boolean(raw, "run.record_blocks", False, problems),
        uneven_batch=read_boolean(raw, "run.uneven_batch", False, problems),
    )


def _read_samples(raw: dict, problems: Problems) -> SampleSettings:
    refuse_unknown("run.samples", raw, keys_of(SampleSettings), problems)
    prompts = raw.get("prompts") or []
    if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
        problems.add("run.samples.prompts", f"is {prompts!r} but must be a list of texts.")
        prompts = []
    return SampleSettings(
        prompts=tuple(prompts),
        max_new_tokens=read_count(raw, "run.samples.max_new_tokens", problems, 64),
        temperature=read_positive_number(raw, "run.samples.temperature", 0.7, problems),
        top_k=read_count(raw, "run.samples.top_k", problems, 20),
    )


def _read_retention(raw: dict, problems: Problems) -> Retention:
    refuse_unknown("run.retention", raw, keys_of(Retention), problems)
    weights = raw.get("weights", "none")
    if weights not in ("none", "all"):
        weights = read_not_negative(raw, "run.retention.weights", 0, problems, "none, all or a whole number")
    retention = Retention(
        last=read_not_negative(raw, "run.retention.last", 2, problems),
        best=read_not_negative(raw, "run.retention.best", 0, problems),
        every_tokens=read_optional_count(raw, "run.retention.every_tokens", problems),
        weights=weights,
    )
    if retention.last == 0 and weights in ("none", 0):
        problems.add(
            "run.retention.last",
            "is 0 and no weights are kept either. Set last: 1, or weights: all for checkpoints of weights only.",
        )
    return retention


def _read_spikes(raw: dict, problems: Problems) -> SpikeSettings:
    refuse_unknown("run.spikes", raw, keys_of(SpikeSettings), problems)
    return SpikeSettings(
        policy=read_choice(raw, "run.spikes.policy", "report", SPIKE_POLICIES, problems),
        window=read_count(raw, "run.spikes.window", problems, 128),
        threshold=read_positive_number(raw, "run.spikes.threshold", 10.0, problems),
        max_rollbacks=read_not_negative(raw, "run.spikes.max_rollbacks", 3, problems),
    )


def read_mixture(value: Any, key: str, problems: Problems) -> tuple[MixtureItem, ...]:
    """A list of datasets with shares or amounts."""
    if not isinstance(value, list) or not value:
        problems.add(key, f"is {value!r} but must be a list like [{{dataset: fineweb, weight: 1.0}}].")
        return ()
    items: list[MixtureItem] = []
    for i, entry in enumerate(value):
        where = f"{key}[{i}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("dataset"), str) or not entry["dataset"]:
            problems.add(where, f"is {entry!r} but must be a mapping with dataset: NAME and weight: NUMBER.")
            continue
        for name in {"where", "filter", "min_score"} & set(entry):
            problems.add(
                f"{where}.{name}",
                "cannot filter blocks, which hold parts of many documents. Prepare score buckets (docs/prepare.md) and "
                f"name one, for example {{dataset: {entry['dataset']}/high}}.",
            )
            entry = {k: v for k, v in entry.items() if k != name}
        refuse_unknown(where, entry, keys_of(MixtureItem), problems)
        given = [name for name in AMOUNTS if entry.get(name) is not None]
        if len(given) > 1:
            problems.add(where, f"has {' and '.join(given)}. Say how much of {entry['dataset']} in one of them.")
        if any(item.dataset == entry["dataset"] for item in items):
            problems.add(where, f"names {entry['dataset']!r} a second time. Give it one entry with the sum.")
        items.append(_read_mixture_item(entry, where, given[0] if given else "weight", problems))
    if 0 < sum(item.weight is None for item in items) < len(items):
        problems.add(key, "mixes weight with tokens or epochs. Say it in shares for all, or in amounts for all.")
    return tuple(items)


def _read_mixture_item(entry: dict, where: str, amount: str, problems: Problems) -> MixtureItem:
    name = entry["dataset"]
    if amount == "tokens":
        return MixtureItem(name, tokens=read_count(entry, f"{where}.tokens", problems))
    value = read_positive_number(entry, f"{where}.{amount}", 1.0, problems)
    return MixtureItem(name, weight=value) if amount == "weight" else MixtureItem(name, epochs=value)


def _read_stages(value: Any, problems: Problems) -> tuple[StageItem, ...]:
    if value is None or value == []:
        return ()
    key = "data.stages"
    if not isinstance(value, list):
        problems.add(key, f"is {value!r} but must be a list like [{{name: short, tokens: 2B, block_size: 512}}].")
        return ()
    stages: list[StageItem] = []
    for i, entry in enumerate(value):
        where = f"{key}[{i}]"
        if not isinstance(entry, dict):
            problems.add(where, f"is {entry!r} but must be a mapping with name, tokens and what changes in the stage.")
            continue
        refuse_unknown(where, entry, keys_of(StageItem), problems)
        name = read_text(entry, f"{where}.name", f"stage {i + 1}", problems)
        if any(stage.name == name for stage in stages):
            problems.add(
                f"{where}.name", f"is {name!r}, which another stage has too. The metrics could not tell them apart."
            )
        mixture = entry.get("mixture")
        stages.append(
            StageItem(
                name=name,
                tokens=read_optional_count(entry, f"{where}.tokens", problems),
                mixture=None if mixture is None else read_mixture(mixture, f"{where}.mixture", problems),
                block_size=read_optional_count(entry, f"{where}.block_size", problems),
                tokens_per_step=read_optional_count(entry, f"{where}.tokens_per_step", problems),
                schedule=_read_schedule(entry, f"{where}.schedule", problems),
                rope=read_mapping(entry, f"{where}.rope", problems),
            )
        )
    return tuple(stages)


def _read_schedule(entry: dict, key: str, problems: Problems) -> Schedule | None:
    if entry.get("schedule") is None:
        return None
    raw = read_mapping(entry, key, problems)
    refuse_unknown(key, raw, keys_of(Schedule), problems)
    shape = read_choice(raw, f"{key}.shape", None, SHAPES, problems)
    end = raw.get("end")
    if shape == "constant":
        if end is not None:
            problems.add(f"{key}.end", f"is {end!r} but a constant stage stays where it begins. Remove end.")
        return Schedule(shape)
    if isinstance(end, bool) or not isinstance(end, int | float) or not 0 <= end <= 1:
        problems.add(f"{key}.end", f"is {end!r} but must be the share of the peak at the stage's end, from 0 to 1.")
        end = 0.0
    return Schedule(shape or "linear", float(end))


def _read_validation(value: Any, problems: Problems) -> tuple[ValidationItem, ...] | None:
    if value is None:
        return None
    key = "data.validation"
    if not isinstance(value, list):
        problems.add(key, f"is {value!r} but must be a list like [{{dataset: fineweb, tokens: 2M}}], or [] for none.")
        return None
    items = []
    for i, entry in enumerate(value):
        where = f"{key}[{i}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("dataset"), str) or not entry["dataset"]:
            problems.add(
                where, f"is {entry!r} but must be a mapping with dataset: NAME and, optionally, tokens: NUMBER."
            )
            continue
        refuse_unknown(where, entry, keys_of(ValidationItem), problems)
        items.append(ValidationItem(entry["dataset"], read_optional_count(entry, f"{where}.tokens", problems)))
    return tuple(items)


def _read_tokenizer(value: Any, problems: Problems) -> str | None:
    """`{train: 50000}` becomes "train:50000", the spelling of data_prep's command line; an id or path stays itself."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, dict) and set(value) == {"train"}:
        return f"train:{read_count(value, 'data.tokenizer.train', problems)}"
    problems.add("data.tokenizer", f"is {value!r} but must be a Hub id, a path, or {{train: 50000}}.")
    return None


def _has_amounts(mixture: tuple[MixtureItem, ...]) -> bool:
    return bool(mixture) and all(item.weight is None for item in mixture)


def _looks_like_path(text: str) -> bool:
    return text.startswith((".", "/", "~", "runs/", "data/")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", text)
