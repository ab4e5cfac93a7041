"""Writes one value into a recipe and leaves everything else of the file as it is: comments, order, quotes, line ends.

In: a recipe and the rows of a micro-batch. Out: the same file with `training.per_device_train_batch_size` changed,
replaced as a whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

from clm.recipe_yaml import YamlProblem, load_yaml
from data_prep.errors import UserError

KEY = ("training", "per_device_train_batch_size")


def check_writable(path: str, overrides: Sequence[str]) -> None:
    """Whether --write could do what it says, before anything is measured.

    Raises:
        UserError: the command line changes the recipe, the file is a run's record or has the value in another form, or
            it or its folder cannot be written.
    """
    if overrides:
        raise UserError(
            f"--write is given together with {' '.join(overrides)}. What is measured would not be what {path} says. "
            "Write those values into it first, or leave out --write and write the line by hand."
        )
    file = Path(path)
    if not file.is_file():
        return  # load_recipe says what is wrong
    try:
        document, _ = load_yaml(file)
    except YamlProblem:
        return
    if "resolved" in document:
        raise UserError(f"{path}: is the record of a run. --write changes recipes of yours only; leave it out.")
    if not os.access(file, os.W_OK) or not os.access(file.resolve().parent, os.W_OK):
        raise UserError(f"{path}: cannot be written, but --write is given. Leave it out, or copy the recipe.")
    if KEY[1] in (document.get(KEY[0]) or {}):  # without it load_recipe's checks say so
        _replaced(file, 1)


def write_rows(path: str, rows: int) -> None:
    """Put `rows` where the recipe has its micro-batch.

    Raises:
        UserError: the file cannot be written, or has become another one meanwhile; it is as it was then.
    """
    file = Path(path).resolve()  # a link stays a link
    content = _replaced(file, rows)
    new = file.with_name(f".{file.name}.tuned")
    try:
        with open(new, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        shutil.copymode(file, new)
        os.replace(new, file)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror}). It is as it was.") from None


def _replaced(file: Path, rows: int) -> bytes:
    """The file's content with another value; everything else is byte for byte the same."""
    text = file.read_bytes().decode("utf-8")
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    for name in KEY:
        node = next((value for key, value in getattr(node, "value", ()) if key.value == name), None)
    if isinstance(node, yaml.ScalarNode):
        changed = text[: node.start_mark.index] + str(rows) + text[node.end_mark.index :]
        expected = yaml.safe_load(text)
        expected[KEY[0]] = {**expected[KEY[0]], KEY[1]: rows}
        with contextlib.suppress(yaml.YAMLError):  # an anchor that other values refer to
            if yaml.safe_load(changed) == expected:
                return changed.encode("utf-8")
    raise UserError(
        f"{file}: training.per_device_train_batch_size is not written there as a number of its own, so it cannot be "
        "changed alone. Nothing was written; change it by hand."
    )
