"""Strict YAML: duplicated keys are errors, every key knows its line, and `3e-4` is the number it looks like.

In: a YAML file. Out: (document, {dotted key: line number}).
PyYAML reads YAML 1.1, where `3e-4` is text (a float needs a dot there) and a key given twice silently keeps the last.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml


class YamlProblem(ValueError):
    """The file cannot be read as one strict YAML mapping; the text names file and line."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with the floats people write."""


# YAML 1.2's float: the dot is optional when there is an exponent.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def load_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int | None]]:
    """Read a YAML mapping.

    Returns:
        The document, and the line (1-based) of each dotted key; list entries count as `key[0]`.
    Raises:
        YamlProblem: not text, not YAML, not a mapping, empty, or a key given twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise YamlProblem(f"{path}: cannot be read as UTF-8 text: {error}.") from None
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise YamlProblem(f"{path}: is empty. Copy a recipe from recipes/ and change it.")
        if not isinstance(node, yaml.MappingNode):
            raise YamlProblem(f"{path}: is not a mapping of sections. A recipe has model:, data:, run: and training:.")
        lines: dict[str, int | None] = {}
        duplicates: list[str] = []
        _walk(node, "", lines, duplicates, path)
        if duplicates:
            raise YamlProblem("\n".join(duplicates))
        return loader.construct_document(node), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise YamlProblem(
            f"{where}: is not valid YAML: {problem}. Check indentation, colons and quotes there."
        ) from None
    finally:
        loader.dispose()


def _walk(node: yaml.Node, prefix: str, lines: dict, duplicates: list[str], path: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            name = str(key_node.value)
            key = f"{prefix}.{name}" if prefix else name
            line = key_node.start_mark.line + 1
            if name in seen:
                duplicates.append(
                    f"{path}:{line}: {key} is given twice (first in line {seen[name]}). Remove one of them."
                )
            seen.setdefault(name, line)
            lines[key] = line
            _walk(value_node, key, lines, duplicates, path)
    elif isinstance(node, yaml.SequenceNode):
        for i, child in enumerate(node.value):
            lines[f"{prefix}[{i}]"] = child.start_mark.line + 1
            _walk(child, f"{prefix}[{i}]", lines, duplicates, path)


def parse_override(text: str) -> tuple[str, Any, str | None]:
    """Split `section.key=value`; the value is read as YAML, so lists and mappings work.

    Returns:
        (key, value, problem): problem is None, or why the text cannot be used.
    """
    key, equals, value = text.partition("=")
    if not equals:
        return key, None, "has no ="
    try:
        return key.strip(), yaml.load(value, Loader=_Loader), None  # a SafeLoader subclass
    except yaml.YAMLError:
        return key, None, "has a value that is not YAML"
