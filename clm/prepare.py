"""Everything a recipe needs, prepared: one `data_prep` command for each dataset of its mixture and validation sets.

In: a recipe. Out: prepared datasets under data/. This is `make prep RECIPE=...`.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys

from clm.recipe import Recipe, load_recipe
from data_prep.catalog import entry_names, load_entry, split_bucket
from data_prep.errors import UserError
from data_prep.paths import dataset_folder


def prepared_block_size(name: str, block_size: int) -> int:
    """The block size to prepare a listed name with: its own where the recipe's may divide it, else the recipe's."""
    entry = load_entry(split_bucket(name)[0])
    own = entry.default_block_size
    return own if own % block_size == 0 and not entry.is_padded else block_size


def prep_commands(recipe: Recipe) -> list[list[str]]:
    """The arguments of `python -m data_prep` for each dataset, in order; all buckets of a dataset are one command.

    A listed dataset keeps its own block size where the recipe's divides it, so that this makes the same folder as
    `make prep DATASET=...`. A tokenizer that is to be trained is trained on the first dataset and used for the others.

    Raises:
        UserError: a dataset that is neither listed nor prepared: its text is not known here.
    """
    names = list(recipe.data.datasets)
    names += [item.dataset for item in recipe.data.validation or () if item.dataset not in names]
    commands: list[list[str]] = []
    for name in names:
        folder = dataset_folder(name)
        dataset, bucket = split_bucket(name)
        if dataset not in entry_names():
            if (folder / "manifest.json").is_file():
                continue
            raise UserError(
                f"{recipe.path}: {name} is neither a listed dataset nor prepared in {folder}. Prepare its text first: "
                f"python -m data_prep prep <files or Hub id> --block-size {recipe.data.block_size} --out {folder}"
            )
        out = str(folder.parent if bucket else folder)
        if bucket and any(command[1].startswith(f"{dataset}/") and command[-1] == out for command in commands):
            continue
        tokenizer = recipe.data.tokenizer
        if tokenizer and tokenizer.startswith("train:") and commands:
            tokenizer = str(dataset_folder(names[0]) / "tokenizer")
        command = ["prep", name, "--block-size", str(prepared_block_size(name, recipe.data.block_size))]
        command += ["--tokenizer", tokenizer] if tokenizer else []
        commands.append([*command, "--out", out])
    return commands


def main(argv: list[str]) -> int:
    """`python -m clm prep RECIPE [options of data_prep prep]`: run the commands in order, stop at the first that fails.

    Returns:
        The exit code: 0, or that of the command that failed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m clm prep",
        description="Prepare all data that a recipe needs. Options it does not know go to `python -m data_prep prep`.",
        epilog="example: python -m clm prep recipes/llama_170m.yaml --max-tokens 100M --num-proc 8",
    )
    parser.add_argument("recipe", help="a YAML file, e.g. recipes/demo.yaml")
    arguments, extra = parser.parse_known_args(argv)
    recipe = load_recipe(arguments.recipe)
    recipe.problems.raise_if_any()
    for command in prep_commands(recipe):
        full = [sys.executable, "-m", "data_prep", *command, *extra]
        print("$ python", *map(shlex.quote, full[1:]), flush=True)
        code = subprocess.run(full).returncode
        if code:
            return code
    return 0
