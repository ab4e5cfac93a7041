"""What is wrong with a recipe, collected; and the readers of single values that collect it.

In: a mapping of the YAML file and a dotted key. Out: the value with its type settled, or a default and a recorded
problem that names file, line, key, value and remedy.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from data_prep.errors import UserError, nearest
from data_prep.sizes import parse_count


class RecipeError(UserError):
    """All that is wrong with a recipe, one problem per line."""


class Problems:
    """Collects what is wrong with one recipe, so that the user sees everything at once.

    Args:
        source: the recipe's path, as the user typed it.
        lines: dotted key -> line number in the file, or None for a key that the command line set.
    """

    def __init__(self, source: str, lines: dict[str, int | None]):
        self.source = source
        self.lines = lines
        self.messages: list[str] = []

    def add(self, key: str, text: str) -> None:
        """Record one problem; `text` continues the sentence that begins with the key."""
        probe = key
        while probe and probe not in self.lines and "." in probe:
            probe = probe.rpartition(".")[0]
        if probe in self.lines and self.lines[probe] is None:
            where = "command line"
        else:
            line = self.lines.get(probe)
            where = f"{self.source}:{line}" if line else self.source
        self.messages.append(f"{where}: {key} {text}")

    def unknown(self, key: str, name: str, choices: Any, what: str = "is not a known key") -> None:
        """Record an unknown name with the nearest known ones."""
        near = nearest(str(name), list(choices))
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(sorted(map(str, choices)))}."
        self.add(key, f"{what}. {hint}")

    def raise_if_any(self) -> None:
        """Raise RecipeError with every recorded problem."""
        if self.messages:
            raise RecipeError("\n".join(self.messages))


def refuse_unknown(prefix: str, raw: dict, known: set[str], problems: Problems) -> None:
    """Record every key that is not known."""
    for name in raw:
        if name not in known:
            problems.unknown(f"{prefix}.{name}", name, known)


def read_text(raw: dict, key: str, default: str | None, problems: Problems) -> str | None:
    """A text that is not empty."""
    value = raw.get(key.rpartition(".")[2], default)
    if value is not default and (not isinstance(value, str) or not value):
        problems.add(key, f"is {value!r} but must be a text.")
        return default
    return value


def read_boolean(raw: dict, key: str, default: bool, problems: Problems) -> bool:
    """true or false."""
    value = raw.get(key.rpartition(".")[2], default)
    if not isinstance(value, bool):
        problems.add(key, f"is {value!r} but must be true or false.")
        return default
    return value


def read_count(raw: dict, key: str, problems: Problems, default: int | None = None) -> int:
    """A whole number of at least 1, written 512, 262_144, 2M or 10B; missing is a problem unless there is a default."""
    value = raw.get(key.rpartition(".")[2], default)
    if value is None:
        problems.add(key, "is missing. Write a number such as 512, 262_144, 2M or 10B.")
        return 1
    try:
        count = parse_count(value)
    except ValueError:
        problems.add(key, f"is {value!r} but must be a whole number such as 512, 262_144, 2M or 10B.")
        return 1
    if count < 1:
        problems.add(key, f"is {value!r} but must be at least 1.")
        return 1
    return count


def read_optional_count(raw: dict, key: str, problems: Problems) -> int | None:
    """As read_count; None where the key is not set."""
    return None if raw.get(key.rpartition(".")[2]) is None else read_count(raw, key, problems)


def read_not_negative(
    raw: dict, key: str, default: int, problems: Problems, what: str = "a whole number, not negative"
) -> int:
    """A whole number of at least 0."""
    value = raw.get(key.rpartition(".")[2], default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        problems.add(key, f"is {value!r} but must be {what}.")
        return default
    return value


def read_choice(raw: dict, key: str, default: str | None, choices: tuple[str, ...], problems: Problems) -> str | None:
    """One of some names."""
    value = raw.get(key.rpartition(".")[2], default)
    if value not in choices:
        problems.unknown(key, str(value), choices, f"is {value!r}, unknown" if value is not None else "is missing")
        return default
    return value


def read_optional_number(raw: dict, key: str, problems: Problems) -> float | None:
    """As read_positive_number; None where the key is not set."""
    return None if raw.get(key.rpartition(".")[2]) is None else read_positive_number(raw, key, 1.0, problems)


def read_positive_number(raw: dict, key: str, default: float, problems: Problems) -> float:
    """A finite number above 0."""
    value = raw.get(key.rpartition(".")[2], default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        problems.add(key, f"is {value!r} but must be a number above 0.")
        return default
    return float(value)


def read_mapping(raw: dict, key: str, problems: Problems) -> dict[str, Any]:
    """A mapping of keys; {} where the key is not set."""
    value = raw.get(key.rpartition(".")[2])
    if value is None:
        return {}
    if not isinstance(value, dict):
        problems.add(key, f"is {value!r} but must be a mapping of keys.")
        return {}
    return dict(value)


def keys_of(section: type) -> set[str]:
    """The names of a dataclass's fields."""
    return {f.name for f in dataclasses.fields(section)}
