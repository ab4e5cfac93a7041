"""The first weights of a model that no process holds whole: one parameter after another, random or from a checkpoint.

In: the recipe's model section. Out: a model whose matrices are on the meta device, with `first_weights(name, shape)`,
which gives the same values as build_model's plain way.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clm.fsdp import Source, fill, matrices_on_meta
from clm.metrics import log
from clm.model import draw_matrix
from data_prep.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from clm.recipe_sections import ModelSection


def build_empty_model(section: ModelSection, config: PretrainedConfig, attention: str, seed: int) -> PreTrainedModel:
    """The model without memory for its matrices, and with `first_weights`, their source.

    Raises:
        UserError: the base model's weights cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with matrices_on_meta():
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    model.tie_weights()
    if section.init == "random":
        model.first_weights = partial(draw_matrix, config, seed, section.scaled_init)
        return model
    names = {name for name, _ in model.named_parameters()}
    model.first_weights = _open_weights(section.init, names) or _load_whole(section.init, config, attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_meta:
                parameter.copy_(model.first_weights(name, parameter.shape))
    return model


def fill_from_files(model: PreTrainedModel, folder: str) -> None:
    """Fill a divided model from a folder in Hub format."""
    source = weights_of_folder(model, folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fill(parameter, source(name, parameter.shape))


def names_match(model: PreTrainedModel, folder: str) -> bool:
    """Whether the files of a folder in Hub format name all parameters as the model does; of fused experts they name
    each one."""
    return _open_weights(folder, {name for name, _ in model.named_parameters()}) is not None


def weights_of_folder(model: PreTrainedModel, folder: str) -> Source:
    """The parameters of a model from a folder in Hub format, one at a time."""
    names = {name for name, _ in model.named_parameters()}
    return _open_weights(folder, names) or _load_whole(folder, model.config, model.config._attn_implementation)


def _open_weights(init: str, names: set[str]) -> Source | None:
    """Reads single parameters of a Hub-format model; None where its files name them otherwise than the model does."""
    from safetensors import safe_open

    files = {}
    for path in _weight_files(init):
        reader = safe_open(path, framework="pt")
        files |= dict.fromkeys(reader.keys(), reader)
    if not names <= set(files):
        return None
    return lambda name, shape: files[name].get_tensor(name).to(torch.float32)


def _weight_files(init: str) -> list[Path]:
    """The *.safetensors of a folder or of a Hub id, downloaded if they are not here yet."""
    if Path(init).is_dir():
        return sorted(Path(init).glob("*.safetensors"))
    from huggingface_hub import snapshot_download

    try:
        return sorted(Path(snapshot_download(init, allow_patterns=["*.safetensors"])).glob("*.safetensors"))
    except (OSError, ValueError):
        return []  # transformers says what is wrong


def _load_whole(init: str, config: Any, attention: str) -> Source:
    """What transformers makes of the files, whole, on each process: names differ, or there are no *.safetensors."""
    from transformers import AutoModelForCausalLM

    log.warning("%s: its files name weights otherwise than transformers does: each process reads all of them.", init)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            init, config=config, attn_implementation=attention, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"model.init is {init!r}, whose weights cannot be loaded: {error}") from None
    weights = dict(model.named_parameters())
    return lambda name, shape: weights[name].detach()
