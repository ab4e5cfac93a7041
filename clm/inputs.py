"""Opens what a recipe names: datasets, validation sets, model config, tokenizer. Problems are collected, not raised.

In: a recipe. Out: memory-mapped splits, validation rows, a config, a tokenizer. With a list `unchecked` (a dry run) a
listed dataset that is not prepared yet is stood in for by the catalogue's numbers, and a sentence says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clm.dataset import ValidationRows
from clm.model import load_checkpoint_config, load_config
from clm.prepare import prepared_block_size
from clm.recipe import Recipe
from data_prep.blocks import Blocks
from data_prep.catalog import entry_names, load_entry, split_bucket
from data_prep.errors import UserError
from data_prep.manifest import is_interrupted, sha256_of
from data_prep.paths import dataset_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

DEFAULT_VALIDATION_TOKENS = 10_000_000  # of each dataset, when the recipe does not say


@dataclass(frozen=True)
class CatalogueSplit:
    """A dataset that is not prepared yet, with the catalogue's numbers: enough for a dry run, not for training."""

    folder: Path
    block_size: int
    num_tokens: int
    packing: str
    is_padded: bool

    @property
    def num_blocks(self) -> int:
        """Whole blocks, as far as the catalogue's count goes."""
        return max(1, self.num_tokens // self.block_size)


def open_mixture(recipe: Recipe, unchecked: list[str] | None) -> list[Blocks | CatalogueSplit]:
    """The train split of each dataset that any stage uses, in the order of `recipe.data.datasets`."""
    problems = recipe.problems
    splits: list[Blocks | CatalogueSplit] = []
    for name, key in recipe.data.datasets.items():
        try:
            split = Blocks(dataset_folder(name), "train")
        except UserError as error:
            listed = _from_catalogue(name, recipe.data.block_size)
            if unchecked is not None and listed is not None:
                unchecked.append(f"{error} (Its numbers above are the catalogue's.)")
                splits.append(listed)
            else:
                problems.add(
                    key,
                    f"cannot be used: {error} (With this recipe's tokenizer and block size: "
                    f"make prep RECIPE={recipe.path})",
                )
            continue
        if split.num_blocks == 0:
            problems.add(key, f"is {name}, which has no whole block to train on. Add text or use a smaller block_size.")
            continue
        try:
            split.check_files()
        except UserError as error:
            problems.add(key, f"cannot be used: {error}")
        first = next((s for s in splits if isinstance(s, Blocks)), split)
        if not splits:
            _check_recipes_tokenizer(recipe, split)
        if split.manifest.tokenizer.sha256 != first.manifest.tokenizer.sha256:
            problems.add(
                key,
                f"is {name}, prepared with another tokenizer than {first.folder}. Prepare both with the same.",
            )
        if split.is_padded and recipe.data.permute_labels:
            problems.add(
                key,
                f"is {name}, whose blocks have padding (packing {split.manifest.packing}), which data.permute_labels "
                "would draw targets from. Prepare it with --packing concat.",
            )
        if split.block_size != first.block_size:
            problems.add(
                key,
                f"is {name}, prepared in blocks of {split.block_size} while {first.folder} has "
                f"{first.block_size}. Prepare both with the same --block-size.",
            )
        splits.append(split)
    return splits


def cannot_be_split(split: Blocks | CatalogueSplit, block_size: int) -> str:
    """Why the blocks of a padded split are not trained in shorter rows, and what to do; for an error message."""
    packing = split.packing if isinstance(split, CatalogueSplit) else split.manifest.packing
    return (
        f"whose documents were packed into blocks of {split.block_size} (packing {packing}). Rows of {block_size} "
        "would cut them again and leave rows of padding alone, so only concat is trained in shorter rows. Use "
        f"{split.block_size}, or prepare it again, into another folder, with --block-size {block_size} or "
        "--packing concat."
    )


def _check_recipes_tokenizer(recipe: Recipe, split: Blocks) -> None:
    """`data.tokenizer` is what prep uses; data that was prepared with another one is not what the recipe says."""
    wanted, source = recipe.data.tokenizer, split.manifest.tokenizer.source
    if wanted is None:
        return
    if wanted.startswith("train:"):
        size = int(wanted.partition(":")[2])
        # one that was trained before, or for another dataset of the recipe, is named by its folder
        is_same = source == {"train": size} or ("path" in source and split.manifest.tokenizer.vocab_size == size)
    else:
        file = Path(wanted) / "tokenizer.json"
        is_same = source.get("id") == wanted or (file.is_file() and source.get("sha256") == sha256_of(file))
    if not is_same:
        made_with = source.get("id") or source.get("path") or f"{{train: {source.get('train')}}}"
        recipe.problems.add(
            "data.tokenizer",
            f"is {wanted} but {split.folder} was prepared with {made_with}, which the model would see. "
            f"Set data.tokenizer to that, or prepare the data with {wanted} into another folder.",
        )


def _from_catalogue(name: str, block_size: int) -> CatalogueSplit | None:
    """A listed dataset whose folder does not exist; an interrupted or damaged preparation is never glossed over."""
    folder = dataset_folder(name)
    dataset, bucket = split_bucket(name)
    if dataset not in entry_names() or folder.exists() or is_interrupted(folder):
        return None
    entry = load_entry(dataset)
    num_tokens = None if bucket else entry.num_tokens  # how much of it a bucket holds is not known
    return CatalogueSplit(
        folder, prepared_block_size(name, block_size), num_tokens or 0, entry.packing, entry.is_padded
    )


def load_model_config(recipe: Recipe, unchecked: list[str] | None) -> PretrainedConfig | None:
    model = recipe.model
    try:
        if model.init != "random":
            return load_checkpoint_config(model.init)
        return load_config(model.config) if model.config and Path(model.config).is_file() else None
    except UserError as error:
        is_hub_id = model.init != "random" and not Path(model.init).exists()
        if unchecked is not None and is_hub_id:
            unchecked.append(str(error))
        else:
            recipe.problems.messages.append(str(error))
        return None


def load_tokenizer(splits: list[Blocks | CatalogueSplit]) -> PreTrainedTokenizerBase | None:
    if not splits or not isinstance(splits[0], Blocks):
        return None
    from transformers import AutoTokenizer

    folder = splits[0].folder / "tokenizer"
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: the prepared tokenizer cannot be loaded: {error}. Prepare the dataset again."
        ) from None


def open_validation(
    recipe: Recipe, mixture: list[Blocks | CatalogueSplit], training: dict[str, Any], unchecked: list[str] | None
) -> list[ValidationRows]:
    """The named sets; by default the validation split of each dataset of the mixture."""
    problems, size = recipe.problems, recipe.data.block_size
    splits = [s for s in mixture if isinstance(s, Blocks)]
    not_prepared = [s.folder for s in mixture if isinstance(s, CatalogueSplit)]
    if training.get("eval_strategy") == "no":
        return []
    wanted: list[tuple[str, Path, int | None]] = []
    if recipe.data.validation is None:
        wanted = [(str(split.folder), split.folder, DEFAULT_VALIDATION_TOKENS) for split in splits]
    else:
        wanted = [(item.dataset, dataset_folder(item.dataset), item.tokens) for item in recipe.data.validation]
    control_seed = training.get("seed", 42) if recipe.data.permute_labels else None
    found = []
    for i, (dataset, folder, tokens) in enumerate(wanted):
        key = f"data.validation[{i}]" if recipe.data.validation is not None else "data.mixture"
        try:
            blocks = Blocks(folder, "validation")
        except UserError as error:
            if unchecked is None or _from_catalogue(dataset, size) is None:
                problems.add(key, f"cannot be used: {error}")
            elif folder not in not_prepared:
                unchecked.append(str(error))
            continue
        if splits and blocks.manifest.tokenizer.sha256 != splits[0].manifest.tokenizer.sha256:
            problems.add(
                key,
                f"is {folder}, prepared with another tokenizer than {splits[0].folder}. Prepare both with the same.",
            )
        elif blocks.block_size % size:
            problems.add(key, f"is {folder}, whose blocks of {blocks.block_size} do not split into rows of {size}.")
        elif blocks.is_padded and blocks.block_size != size:
            problems.add(key, f"is {folder}, {cannot_be_split(blocks, size)}")
        elif blocks.num_blocks:
            found.append(ValidationRows(folder.name, blocks, size, tokens, control_seed))
        elif recipe.data.validation is not None:
            problems.add(
                key, f"is {folder}, whose validation split has no whole block. Prepare it with a larger --val-fraction."
            )
    names = [rows.name for rows in found]
    for name in sorted({n for n in names if names.count(n) > 1}):
        problems.add("data.validation", f"has two sets named {name!r}. Their numbers could not be told apart.")
    return found
