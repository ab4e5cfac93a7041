"""A recipe: one YAML file that describes one complete run.

In: a YAML file with the sections `model`, `data`, `run`, `training`, and overrides `section.key=value`.
Out: a `Recipe` of four typed sections, or a `RecipeError` that names every problem at once.

`training` holds transformers.TrainingArguments under their own names and is checked in clm/arguments.py;
the other three are the dataclasses below. A value is never changed silently: it is obeyed or refused.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clm.problems import (
    Problems,
    RecipeError,
    read_boolean,
    read_count,
    read_positive_number,
    read_text,
    refuse_unknown,
)
from clm.recipe_yaml import YamlProblem, load_yaml, parse_override

SECTIONS = ("model", "data", "run", "training")
ATTENTION_CHOICES = ("auto", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "eager")


@dataclass(frozen=True)
class MixtureItem:
    """One dataset of the mixture: a name under data/ or a path, and its share of the tokens (any scale)."""

    dataset: str
    weight: float = 1.0


@dataclass(frozen=True)
class ValidationItem:
    """One named validation set: the first `tokens` tokens of a dataset's validation split (None: all of it)."""

    dataset: str
    tokens: int | None = None


@dataclass(frozen=True)
class SampleSettings:
    """Texts that are written to samples.jsonl at each evaluation."""

    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 64
    temperature: float = 0.7
    top_k: int = 20


@dataclass
class ModelSection:
    """What is trained. `config`: architecture for `init: random`; `init`: random, or a folder or Hub id to continue."""

    config: str | None = None
    init: str = "random"
    attention: str = "auto"
    scaled_init: bool = False


@dataclass
class DataSection:
    """What it is trained on. Token counts may be written 10B, 262_144, 2M; `tokenizer` is what prep uses."""

    mixture: tuple[MixtureItem, ...] = ()
    tokenizer: str | None = None
    block_size: int = 0
    tokens: int = 0
    tokens_per_step: int = 0
    validation: tuple[ValidationItem, ...] | None = None
    shuffle: bool = True
    max_epochs: float = 4.0
    permute_labels: bool = False


@dataclass
class RunSection:
    """What Trainer has no word for."""

    samples: SampleSettings = field(default_factory=SampleSettings)


@dataclass
class Recipe:
    """A loaded recipe. `training` is checked by clm.arguments; `problems` is shared so that all errors come at once."""

    path: Path
    model: ModelSection
    data: DataSection
    run: RunSection
    training: dict[str, Any]
    problems: Problems

    @property
    def name(self) -> str:
        """The run's name: training.run_name, else the recipe's file name."""
        return str(self.training.get("run_name") or self.path.stem)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain YAML-able data, every default written out."""
        sections = {name: _plain(dataclasses.asdict(getattr(self, name))) for name in ("model", "data", "run")}
        sections["data"]["tokenizer"] = self._tokenizer_value()
        return {**sections, "training": _plain(self.training)}

    def _tokenizer_value(self) -> Any:
        text = self.data.tokenizer
        return {"train": int(text.partition(":")[2])} if text and text.startswith("train:") else text


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe strictly; problems are collected in `recipe.problems`, unreadable files raise at once.

    Args:
        path: the YAML file.
        overrides: `section.key=value` strings of the command line; values are read as YAML.
    Raises:
        RecipeError: no file, not a mapping, unparsable, duplicated keys.
    """
    path = Path(path)
    source = str(path)
    if path.is_dir():
        raise RecipeError(f"{source}: is a folder, not a recipe. Name a YAML file, for example recipes/demo.yaml.")
    if not path.is_file():
        beside = sorted(str(p) for p in (path.parent if path.parent.is_dir() else Path("recipes")).glob("*.yaml"))
        hint = f" Recipes there: {', '.join(beside)}." if beside else ""
        raise RecipeError(f"{source}: this recipe does not exist.{hint}")
    try:
        document, lines = load_yaml(path)
    except YamlProblem as error:
        raise RecipeError(str(error)) from None
    problems = Problems(source, lines)
    for text in overrides:
        _apply_override(document, lines, text, problems)
    document.pop("resolved", None)  # runs/<name>/recipe.yaml is itself a recipe
    for name in document:
        if name not in SECTIONS:
            problems.unknown(str(name), name, SECTIONS, "is not a section of a recipe")
    raw = {name: document.get(name) or {} for name in SECTIONS}
    for name, value in raw.items():
        if not isinstance(value, dict):
            problems.add(name, f"is {value!r} but a section is a mapping of keys. Write its keys indented below it.")
            raw[name] = {}
    recipe = Recipe(
        path,
        _read_model(raw["model"], problems),
        _read_data(raw["data"], problems),
        _read_run(raw["run"], problems),
        dict(raw["training"]),
        problems,
    )
    return recipe


def _apply_override(document: dict, lines: dict, text: str, problems: Problems) -> None:
    key, value, problem = parse_override(text)
    parts = key.split(".")
    if problem or len(parts) < 2 or not all(parts):
        problems.messages.append(
            f"command line: {text!r} {problem or 'is not section.key=value'}. "
            "Write for example training.learning_rate=3e-4."
        )
        return
    node = document
    for part in parts[:-1]:
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            problems.messages.append(f"command line: {key} goes inside {part}, which is {child!r} and has no keys.")
            return
        node = child
    node[parts[-1]] = value
    for known in [k for k in lines if k == key or k.startswith(key + ".")]:
        del lines[known]
    lines[key] = None


# --- one reader per section: each key is taken out, checked and converted; what remains is unknown -------------------


def _read_model(raw: dict, problems: Problems) -> ModelSection:
    known = {f.name for f in dataclasses.fields(ModelSection)}
    refuse_unknown("model", raw, known, problems)
    section = ModelSection(
        config=read_text(raw, "model.config", None, problems),
        init=read_text(raw, "model.init", "random", problems),
        attention=read_text(raw, "model.attention", "auto", problems),
        scaled_init=read_boolean(raw, "model.scaled_init", False, problems),
    )
    if section.attention not in ATTENTION_CHOICES:
        problems.unknown("model.attention", section.attention, ATTENTION_CHOICES, f"is {section.attention!r}, unknown")
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


def _read_data(raw: dict, problems: Problems) -> DataSection:
    refuse_unknown("data", raw, {f.name for f in dataclasses.fields(DataSection)}, problems)
    section = DataSection(
        mixture=_read_mixture(raw.get("mixture"), problems),
        tokenizer=_read_tokenizer(raw.get("tokenizer"), problems),
        block_size=read_count(raw, "data.block_size", problems),
        tokens=read_count(raw, "data.tokens", problems),
        tokens_per_step=read_count(raw, "data.tokens_per_step", problems),
        validation=_read_validation(raw.get("validation"), problems),
        shuffle=read_boolean(raw, "data.shuffle", True, problems),
        max_epochs=read_positive_number(raw, "data.max_epochs", 4.0, problems),
        permute_labels=read_boolean(raw, "data.permute_labels", False, problems),
    )
    return section


def _read_run(raw: dict, problems: Problems) -> RunSection:
    refuse_unknown("run", raw, {f.name for f in dataclasses.fields(RunSection)}, problems)
    samples = raw.get("samples") or {}
    if not isinstance(samples, dict):
        problems.add(
            "run.samples", f"is {samples!r} but must be a mapping with prompts, max_new_tokens, temperature, top_k."
        )
        return RunSection()
    refuse_unknown("run.samples", samples, {f.name for f in dataclasses.fields(SampleSettings)}, problems)
    prompts = samples.get("prompts") or []
    if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
        problems.add("run.samples.prompts", f"is {prompts!r} but must be a list of texts.")
        prompts = []
    return RunSection(
        samples=SampleSettings(
            prompts=tuple(prompts),
            max_new_tokens=read_count(samples, "run.samples.max_new_tokens", problems, 64),
            temperature=read_positive_number(samples, "run.samples.temperature", 0.7, problems),
            top_k=read_count(samples, "run.samples.top_k", problems, 20),
        )
    )


def _read_mixture(value: Any, problems: Problems) -> tuple[MixtureItem, ...]:
    key = "data.mixture"
    if not isinstance(value, list) or not value:
        problems.add(key, f"is {value!r} but must be a list like [{{dataset: fineweb, weight: 1.0}}].")
        return ()
    items: list[MixtureItem] = []
    for i, entry in enumerate(value):
        where = f"{key}[{i}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("dataset"), str) or not entry["dataset"]:
            problems.add(where, f"is {entry!r} but must be a mapping with dataset: NAME and weight: NUMBER.")
            continue
        refuse_unknown(where, entry, {"dataset", "weight"}, problems)
        weight = read_positive_number(entry, f"{where}.weight", 1.0, problems)
        if any(item.dataset == entry["dataset"] for item in items):
            problems.add(where, f"names {entry['dataset']!r} a second time. Give it one entry with the summed weight.")
        items.append(MixtureItem(entry["dataset"], weight))
    return tuple(items)


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
        refuse_unknown(where, entry, {"dataset", "tokens"}, problems)
        tokens = read_count(entry, f"{where}.tokens", problems) if entry.get("tokens") is not None else None
        items.append(ValidationItem(entry["dataset"], tokens))
    return tuple(items)


def _read_tokenizer(value: Any, problems: Problems) -> str | None:
    """`{train: 50000}` becomes "train:50000", the spelling of data_prep's command line; an id or path stays itself."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, dict) and set(value) == {"train"}:
        size = read_count(value, "data.tokenizer.train", problems)
        return f"train:{size}"
    problems.add("data.tokenizer", f"is {value!r} but must be a Hub id, a path, or {{train: 50000}}.")
    return None


def _looks_like_path(text: str) -> bool:
    return text.startswith((".", "/", "~", "runs/", "data/")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", text)


def _plain(value: Any) -> Any:
    """Tuples to lists and paths to text, so that YAML shows nothing of Python."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
