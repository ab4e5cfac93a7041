"""A recipe: one YAML file that describes one complete run.

In: a YAML file with the sections `model`, `data`, `run`, `training`, and overrides `section.key=value`.
Out: a `Recipe` of four sections, or a `RecipeError` that names every problem at once.

The keys are in clm/recipe_sections.py, the readers in clm/recipe_readers.py; `training` holds
transformers.TrainingArguments under their own names and is checked in clm/arguments.py.
A value is never changed silently: it is obeyed or refused.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clm.problems import Problems, RecipeError
from clm.recipe_readers import read_data, read_model, read_run
from clm.recipe_sections import DataSection, ModelSection, RunSection
from clm.recipe_yaml import YamlProblem, load_yaml, parse_override
from data_prep.paths import runs_dir

SECTIONS = ("model", "data", "run", "training")


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
        """The run's name: training.run_name, else the recipe's file name; runs/<name>/recipe.yaml is that run's."""
        own = self.path.parent.name
        is_record = (
            self.path.name == "recipe.yaml" and self.path.absolute() == (runs_dir() / own / self.path.name).absolute()
        )
        return str(self.training.get("run_name") or (own if is_record else self.path.stem))

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain YAML-able data, every default written out."""
        sections = {name: _plain(dataclasses.asdict(getattr(self, name))) for name in ("model", "data", "run")}
        sections["data"]["tokenizer"] = self._tokenizer_value()
        for items in (sections["data"]["mixture"], sections["data"]["stages"]):
            items[:] = [_without_unset(item) for item in items]
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
    return Recipe(
        path,
        read_model(raw["model"], problems),
        read_data(raw["data"], problems),
        read_run(raw["run"], problems),
        dict(raw["training"]),
        problems,
    )


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


def _plain(value: Any) -> Any:
    """Tuples to lists and paths to text, so that YAML shows nothing of Python."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _without_unset(item: dict[str, Any]) -> dict[str, Any]:
    """A mixture item or a stage without the keys that are not set."""
    found = {k: v for k, v in item.items() if v is not None and v != {}}
    for key, value in found.items():
        if isinstance(value, list):
            found[key] = [_without_unset(v) for v in value]
        elif isinstance(value, dict):
            found[key] = _without_unset(value)
    return found
