"""Proof that a run's final/ is the model that was trained, in a process that knows nothing of the training code.

In: runs/<name>. Out: the validation loss of the last evaluation, computed again from final/ with AutoModelForCausalLM
and a plain loop of this file's own, beside the one that training wrote down; and whether AutoTokenizer gives the
dataset's ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clm.run_folder import find_run, last_evaluation, model_folder, read_metrics, read_recipe
from data_prep.blocks import NO_TARGET, Blocks
from data_prep.errors import UserError
from data_prep.manifest import load_manifest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}  # relative; other batch shapes round differently
_LOGITS = 2**26  # at most so many logits at once: 256 MiB in fp32
SAMPLE_TEXT = "def f(x):\n    return x  # naïve café, 東京, 🦙\tend\r\n\n\n"


def iter_rows(
    folder: Path, block_size: int, num_rows: int, rows_at_once: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The first rows of a validation split, in order; a prepared block may be several rows long.

    Yields:
        (inputs, targets), each int64 (at most rows_at_once, block_size): position i of a row predicts the token after
        it, -100 where none follows.
    Raises:
        UserError: the split has fewer rows.
    """
    blocks = Blocks(folder, "validation")
    rows_per_block = blocks.block_size // block_size
    if num_rows > blocks.num_blocks * rows_per_block:
        raise UserError(
            f"{folder}: {num_rows:,} rows were evaluated in training, but its validation split has now "
            f"{blocks.num_blocks * rows_per_block:,}. It was prepared again since. Train again or prepare it as before."
        )
    for first in range(0, num_rows, rows_at_once):
        last = min(first + rows_at_once, num_rows)
        first_block = first // rows_per_block
        inputs, targets = blocks.read_rows(np.arange(first_block, -(-last // rows_per_block)))
        wanted = slice(first - first_block * rows_per_block, last - first_block * rows_per_block)
        yield inputs.reshape(-1, block_size)[wanted], targets.reshape(-1, block_size)[wanted]


def separate_documents(inputs: np.ndarray, targets: np.ndarray, eos: int) -> tuple[np.ndarray, np.ndarray]:
    """Document masking by the book: positions that restart behind each EOS, and no target where EOS is the input."""
    positions = np.empty_like(inputs)
    for row, found in zip(inputs, positions, strict=True):
        starts = [0, *(np.flatnonzero(row[:-1] == eos) + 1), len(row)]
        found[:] = np.concatenate([np.arange(end - start) for start, end in pairwise(starts)])
    return positions, np.where(inputs == eos, NO_TARGET, targets)


def compute_loss(
    model: PreTrainedModel, folder: Path, block_size: int, num_rows: int, precision: str, is_masked: bool = False
) -> tuple[float, int]:
    """Summed negative log likelihood (nats) of the first rows of a validation split, and the number of targets.

    Args:
        precision: fp32, or bf16 for autocast as in training.
        is_masked: the run had data.document_mask.
    """
    import torch

    rows_at_once = max(1, _LOGITS // (max(model.config.vocab_size, block_size) * block_size))
    eos = load_manifest(folder).tokenizer.eos_token_id
    total, count = 0.0, 0
    with torch.no_grad():
        for inputs, targets in iter_rows(folder, block_size, num_rows, rows_at_once):
            positions = None
            if is_masked:
                positions, targets = separate_documents(inputs, targets, eos)
                positions = torch.from_numpy(positions).to(model.device)
            ids, labels = (torch.from_numpy(array).to(model.device) for array in (inputs, targets))
            with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = model(ids, position_ids=positions, use_cache=False).logits
            total += _summed_loss(logits, labels)
            count += int((targets != NO_TARGET).sum())
    return total, count


def _summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Sum over positions of -log softmax(logits)[label], logits (B, T, V), labels (B, T)."""
    import torch.nn.functional as F

    return F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=NO_TARGET, reduction="sum"
    ).item()


def check_tokenizer(final: Path, dataset: Path) -> list[str]:
    """How the tokenizer in final/ differs from the dataset's: ids, decoded text, special ids; [] when it does not."""
    from transformers import AutoTokenizer

    ours = AutoTokenizer.from_pretrained(final, local_files_only=True)
    theirs = AutoTokenizer.from_pretrained(dataset / "tokenizer", local_files_only=True)
    ids = theirs(SAMPLE_TEXT)["input_ids"]
    checks = {
        "size": (len(ours), len(theirs)),
        "ids of a sample text": (ours(SAMPLE_TEXT)["input_ids"], ids),
        "decoded text": (ours.decode(ids), theirs.decode(ids)),
        **{
            name: (getattr(ours, name), getattr(theirs, name))
            for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        },
    }
    return [
        f"{name}: {found!r}, but {expected!r} with {dataset}"
        for name, (found, expected) in checks.items()
        if found != expected
    ]


def reload_run(name: str) -> int:
    """`python -m clm reload`: print both losses and their difference; the exit code is 1 when they differ."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    run = find_run(name)
    recipe, evaluation = read_recipe(run), last_evaluation(read_metrics(run))
    resolved, sets = recipe["resolved"], recipe["resolved"].get("validation") or []
    if evaluation is None or not sets:
        raise UserError(
            f"{run / 'metrics.jsonl'}: has no evaluation to compare with. Set data.validation and train again."
        )
    if recipe["data"].get("permute_labels"):
        raise UserError(
            f"{run / 'recipe.yaml'}: data.permute_labels is true: a control run, whose labels only its training knows."
        )
    final = model_folder(run)
    precision = resolved.get("precision", "fp32")
    transformers.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32, local_files_only=True).eval().to(device)

    is_same = True
    total, count = 0.0, 0
    for item in sets:
        block_size = recipe["data"]["block_size"]
        nats, targets = compute_loss(
            model,
            Path(item["folder"]),
            block_size,
            item["num_tokens"] // block_size,
            precision,
            recipe["data"].get("document_mask", False),
        )
        total, count = total + nats, count + targets
        if len(sets) > 1:
            is_same &= _print_comparison(
                item["name"], evaluation[f"eval_{item['name']}_loss"], nats, targets, precision
            )
    is_same &= _print_comparison(
        "all" if len(sets) > 1 else sets[0]["name"], evaluation["eval_loss"], total, count, precision
    )
    if count != evaluation["eval_num_tokens"]:
        print(f"evaluated {count:,} tokens, but training {evaluation['eval_num_tokens']:,}")
        is_same = False
    differences = check_tokenizer(final, Path((resolved.get("datasets") or sets)[0]["folder"]))
    for line in differences:
        print(f"tokenizer differs in {line}")
    if not differences:
        print("tokenizer: AutoTokenizer encodes and decodes as the dataset's own")
    print("reload: the same model" if is_same and not differences else "reload: NOT the same model")
    return 0 if is_same and not differences else 1


def _print_comparison(name: str, written: float, nats: float, count: int, precision: str) -> bool:
    loss = nats / count
    difference = abs(loss - written)
    print(
        f"validation loss, {name}: {written:.6f} in training, {loss:.6f} from final/, difference {difference:.1e}",
        end=" ",
    )
    print(f"({count:,} tokens, {precision})")
    return difference <= TOLERANCES[precision] * abs(written)
