"""Document masking (`data.document_mask`): no token of a row sees another document.

In: rows of tokens in which every document ends with EOS. Out: positions that restart at each document, in which
transformers' attention finds the borders, and targets without the first tokens of documents, which nothing predicts.

    EOS is 1, the next row starts with 9:
        input_ids      5 6 1 7 1 1 8 4
        position_ids   0 1 2 0 1 0 0 1
        shift_labels   6 1 - 1 - - 4 9        - is -100

What follows a row's border is a fresh context: its positions start at 0 in the middle of a document too.
Whether the model really keeps documents apart is tested on the real back end before training (`check_no_leak`), since
one argument is enough to switch the mask off without a word: any `attention_mask`, or `use_cache=True`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from clm.dataset import as_batch
from clm.loss_only import is_installed
from data_prep.blocks import NO_TARGET
from data_prep.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from clm.trainer import ClmTrainer

log = logging.getLogger("clm.document_mask")

Batch = dict[str, Any]

MOST_POSITIONS = 32  # of each row are compared, spread over document B, its first token among them
# Both are shares of what the same change does to B without a mask; a leak does as much. With a mask B's numbers are the
# same whatever A says, bit for bit in every case tried; only a mixture of experts, which sorts the tokens of a batch,
# may round them differently.
LARGEST_MOVE = 0.01
# B at another place of its row is summed in another order: in bf16 with random weights up to 0.005 was measured.
LARGEST_ROUNDING = 0.2


@dataclass(frozen=True)
class DocumentMask:
    """Finds the documents of a micro-batch.

    Args:
        eos_token_id: the last token of each document, never inside one.
        attention: the implementation that the model runs with.
    """

    eos_token_id: int
    attention: str

    def targets(self, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """(B, T) targets, -100 where the next token is the first of another document."""
        return np.where(inputs == self.eos_token_id, NO_TARGET, targets)

    def model_inputs(self, inputs: np.ndarray) -> Batch:
        """What the model needs beside the tokens: `position_ids`, (B, T) int64.

        FlashAttention reads borders from positions only in a batch of one row and silently sees none in a larger one
        (transformers/modeling_flash_attention_utils.py, _is_packed_sequence). It gets them as offsets into the rows
        laid end to end; the longest document is said to be T tokens, since its exact length, an int, would make
        torch.compile compile for each.
        """
        num_rows, length = inputs.shape
        is_first = np.ones((num_rows, length), dtype=bool)
        is_first[:, 1:] = inputs[:, :-1] == self.eos_token_id
        column = np.arange(length)
        starts = np.maximum.accumulate(np.where(is_first, column, 0), axis=1)
        found: Batch = {"position_ids": torch.from_numpy(column - starts)}
        if self.attention.startswith("flash_attention"):
            offsets = torch.from_numpy(np.append(np.flatnonzero(is_first), inputs.size).astype(np.int32))
            found |= {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
            found |= {"max_length_q": length, "max_length_k": length}
        return found


def check_run(trainer: ClmTrainer) -> None:
    """`check_no_leak` on a run's model as training calls it; on every rank, since ZeRO stage 3 needs all of them."""
    plan, length = trainer.plan, trainer.train_dataset.block_size
    check_no_leak(
        trainer.model,
        plan.document_mask,
        (plan.samples_per_micro_batch * plan.prepared_block_size // length, length),
        len(plan.tokenizer),
        trainer.args.device,
        str(plan.recipe.path),
        trainer.called_model,
    )


def check_no_leak(
    model: PreTrainedModel,
    mask: DocumentMask,
    shape: tuple[int, int],
    vocab_size: int,
    device: torch.device,
    source: str,
    wrapped: torch.nn.Module | None = None,
) -> None:
    """Change document A of a row; the logits of document B beside it must stay, and be those of B without A.

    A control without a border between them must move. Random state, gradients and the model's mode stay as they are.

    Args:
        model: the model itself, whose attention can be switched to name in the message those that work.
        shape: rows and tokens of a micro-batch: with torch.compile another shape would be compiled beside it.
        vocab_size: tokens are drawn from [0, vocab_size).
        source: the recipe, for the message.
        wrapped: what training calls (compiled, an engine) when that is not the model itself.
    Raises:
        UserError: documents see each other.
    """
    if shape[1] < 4:
        return  # no room for two documents
    called = model if wrapped is None else wrapped
    with _undisturbed(called, device):
        # the loss-only forward keeps its logits to itself unless it is asked for them
        more = {"return_logits": True} if is_installed(model) else {}
        finding = _measure_leak(called, mask, shape, vocab_size, device, more)
        if finding is None:
            return
        names = ("sdpa", "eager", "flex_attention") if device.type == "cuda" else ("sdpa", "eager")
        others = [name for name in names if name != mask.attention]
        working = [name for name in others if _works(model, name, mask, shape, vocab_size, device)]
    if working:
        remedy = f"Set model.attention: {' or '.join(working)} (tested just now), or data.document_mask: false."
    else:
        kind = model.config.model_type
        remedy = f"With {' and '.join(others)} this {kind} model does the same. Set data.document_mask: false."
    raise UserError(
        f"{source}: model.attention is {mask.attention} but data.document_mask is true and documents of one row see "
        f"each other: {finding}. The loss would not be that of separate documents. {remedy}"
    )


@contextlib.contextmanager
def _undisturbed(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation without gradients; random state and mode as before afterwards."""
    was_training = model.training
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            model.train(was_training)


def _measure_leak(
    forward: Callable[..., Any],
    mask: DocumentMask,
    shape: tuple[int, int],
    vocab_size: int,
    device: torch.device,
    more: Batch,
) -> str | None:
    """What is wrong, in words, or None; `more` is for the forward.

    The border lies elsewhere in each row, so that a mask made of one row's documents does not fit the others.
    """
    num_rows, length = shape
    eos = mask.eos_token_id
    border = length // 2 - np.arange(num_rows) % max(1, length // 4)  # B's first position
    drawn = np.random.default_rng(0).integers(0, vocab_size - 1, (2, num_rows, length))
    first, second = drawn + (drawn >= eos)  # any token but EOS
    column, last_of_a = np.arange(length), border[:, None] - 1
    changed = np.where(column < last_of_a, second, first)  # another A, but for its last token; the same B
    turned = np.stack([np.roll(row, -start) for row, start in zip(first, border, strict=True)])  # B, then A
    offsets = np.unique(np.linspace(0, length - border.max() - 1, MOST_POSITIONS).astype(np.int64))
    in_b = torch.from_numpy(border[:, None] + offsets)

    def logits_of_b(tokens: np.ndarray, where: torch.Tensor) -> torch.Tensor:
        batch = as_batch(tokens, np.roll(tokens, -1, axis=1), mask)
        batch = {n: v.to(device) if torch.is_tensor(v) else v for n, v in batch.items()}
        logits = forward(**batch, **more).logits
        return logits[torch.arange(num_rows)[:, None].to(device), where.to(device)].clone()

    def end_with_eos(tokens: np.ndarray) -> np.ndarray:
        return np.where(column == last_of_a, eos, tokens)

    b_beside_a = logits_of_b(end_with_eos(first), in_b)
    move = _distance(logits_of_b(end_with_eos(changed), in_b), b_beside_a)
    without_mask = _distance(logits_of_b(changed, in_b), logits_of_b(first, in_b))
    if not 0 < without_mask < float("inf"):
        log.warning(
            "document mask: not tested, the logits of this model are %s",
            "the same for every text" if without_mask == 0 else "no numbers",
        )
        return None
    if not move <= LARGEST_MOVE * without_mask:
        return (
            f"other tokens in one document move the logits of the next one by {move:.2g} "
            f"(without a mask by {without_mask:.2g})"
        )
    # B first in its row, behind it a border and A, which it cannot see anyway: B alone
    turned[np.arange(num_rows), length - border] = eos
    alone = logits_of_b(turned, torch.from_numpy(np.broadcast_to(offsets, in_b.shape).copy()))
    difference = _distance(alone, b_beside_a)
    if not difference <= LARGEST_ROUNDING * without_mask:
        return f"the logits of a document differ by {difference:.2g} from those of the same document alone in a row"
    return None


def _works(
    model: PreTrainedModel,
    attention: str,
    mask: DocumentMask,
    shape: tuple[int, int],
    vocab_size: int,
    device: torch.device,
) -> bool:
    """Whether the same model keeps documents apart with another attention, as far as a forward can tell."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(attention)
        more = {"return_logits": True} if is_installed(model) else {}
        return _measure_leak(model, replace(mask, attention=attention), shape, vocab_size, device, more) is None
    except Exception:  # not installed, not for this device, not for this architecture: none of them a remedy
        return False
    finally:
        model.config._attn_implementation = before


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one.float() - other.float()).abs().max().item()
