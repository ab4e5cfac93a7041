"""A run's model as folders in Hub format: the base model, the language model, or both.

In: a run's final/ or one of its checkpoints. Out: `lm` = LlamaForCausalLM (with generation_config.json), `base` =
LlamaModel, without the output head; each with tokenizer, config and model card. Each is loaded again and must compute
the same numbers.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from clm.card import write_card
from clm.run_folder import find_run, model_folder, tokenizer_folder
from data_prep.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

KINDS = {"base": ("base",), "lm": ("lm",), "both": ("base", "lm")}


def export_model(
    run: Path, checkpoint: int | None, what: str, out: Path | None, dtype: str, is_ema: bool = False
) -> list[Path]:
    """Write the model's folders and prove that they load.

    Args:
        what: base, lm or both; both makes two subfolders of `out`.
        out: default is runs/<name>/export (both), else runs/<name>/export/<what>; with is_ema export-ema.
        dtype: float32 or bfloat16, how the weights are stored.
        is_ema: the averaged weights of run.ema.
    Raises:
        UserError: `out` is not empty, or the exported model computes something else.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = model_folder(run, checkpoint, is_ema)
    kinds = KINDS[what]
    if out is None:
        out = run / ("export-ema" if is_ema else "export")
        out = out if len(kinds) > 1 else out / what
    folders = {kind: out / kind if len(kinds) > 1 else out for kind in kinds}
    for folder in folders.values():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(
                f"--out is {folder}, which exists and is not empty. Nothing is overwritten. "
                f"Name another folder, or: rm -r {folder}"
            )
    transformers.logging.disable_progress_bar()
    beside = tokenizer_folder(run, model_folder(run, checkpoint))
    tokenizer = AutoTokenizer.from_pretrained(beside, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype), local_files_only=True).eval()
    for kind, folder in folders.items():
        part = model.base_model if kind == "base" else model
        temporary = folder.with_name(f".tmp-{folder.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        part.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_card(run, temporary, is_ema)
        _check_same_numbers(part, temporary, kind)
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
    return list(folders.values())


def _check_same_numbers(model: PreTrainedModel, folder: Path, kind: str) -> None:
    """Load `folder` and compare its output with `model`'s on a few tokens: the same weights, so the same bits."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    auto = AutoModel if kind == "base" else AutoModelForCausalLM
    again = auto.from_pretrained(folder, dtype=model.dtype, local_files_only=True).eval()
    length = min(16, model.config.max_position_embeddings)
    ids = torch.arange(length).remainder(model.config.vocab_size).unsqueeze(0)
    with torch.no_grad():
        expected, found = _output(model, ids, kind), _output(again, ids, kind)
    difference = (expected - found).abs().max().item()
    if not difference == 0:
        raise UserError(
            f"{folder}: the exported model computes other numbers than the run's (largest difference "
            f"{difference:.3g}). It is left there for a look and is not to be used."
        )


def _output(model: PreTrainedModel, ids: torch.Tensor, kind: str) -> torch.Tensor:
    result = model(ids, use_cache=False)
    return (result.last_hidden_state if kind == "base" else result.logits).float()


def print_export(
    name: str, checkpoint: int | None, what: str, out: str | None, dtype: str, is_ema: bool = False
) -> None:
    """`python -m clm export`: export and say where."""
    for folder in export_model(find_run(name), checkpoint, what, Path(out) if out else None, dtype, is_ema):
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{folder}  ({size / 1e6:,.1f} MB, {dtype}; loaded again: same numbers)")
