"""The loss of single tokens under saved weights, row by row as in training.

In: a model folder and prepared blocks with the token after each. Out: for every position the nats that the token after
it costs, NaN where training has no target. In fp32 and without dropout, so that the mean is close to the loss that
training logged, not equal to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep.blocks import NO_TARGET

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOGITS = 2**26  # at most so many logits at once: 256 MiB in fp32


def load_weights(folder: Path) -> PreTrainedModel:
    """The model of a folder in fp32 on the best device, ready to evaluate."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    )
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def iter_losses(
    model: PreTrainedModel, tokens: np.ndarray, block_size: int, masked_at: int | None
) -> Iterator[np.ndarray]:
    """The losses of one prepared block after the other.

    Args:
        tokens: int64 (n, P + 1), blocks with the token after each, NO_TARGET where there is none and for padding.
        block_size: T of the rows; divides P.
        masked_at: EOS for a run with data.document_mask, else None.
    Yields:
        float32 (P,): position i holds the loss of token i + 1, given what comes before it in its row.
    """
    import torch
    import torch.nn.functional as F

    mask = None
    if masked_at is not None:
        from clm.document_mask import DocumentMask

        mask = DocumentMask(masked_at, "sdpa")
    rows_at_once = max(1, _LOGITS // (model.config.vocab_size * block_size))
    for block in tokens:
        inputs, targets = (part.reshape(-1, block_size) for part in (block[:-1], block[1:]))
        losses = np.empty(inputs.shape, dtype=np.float32)
        for first in range(0, len(inputs), rows_at_once):
            here = slice(first, first + rows_at_once)
            more = {} if mask is None else mask.model_inputs(inputs[here])
            labels = targets[here] if mask is None else mask.targets(inputs[here], targets[here])
            ids = np.maximum(inputs[here], 0)  # padding, which is behind all that is looked at
            ids, labels = (torch.from_numpy(np.ascontiguousarray(a)).to(model.device) for a in (ids, labels))
            more = {name: value.to(model.device) for name, value in more.items()}
            with torch.no_grad():
                logits = model(ids, use_cache=False, **more).logits.float()
            each = F.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=NO_TARGET, reduction="none"
            ).view_as(labels)
            losses[here] = each.masked_fill(labels == NO_TARGET, float("nan")).cpu().numpy()
        yield losses.reshape(-1)
