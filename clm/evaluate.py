"""Token-exact evaluation: summed negative log likelihood, tokens and bytes, the same for any batch size and world size.

Stock Trainer averages the losses of batches repeated by batch size, which is not the mean over tokens when the last
batch is smaller or has ignored targets. Here each rank sums its rows, the sums are added over ranks, and one division
gives the loss. Bits per byte = summed NLL / ln 2 / UTF-8 bytes of the predicted tokens (control tokens: 0 bytes, their
loss counts), so that models with different tokenizers can be compared.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from clm.dataset import ValidationRows, as_batch
from data_prep.blocks import NO_TARGET

if TYPE_CHECKING:
    from collections.abc import Callable

    from clm.document_mask import DocumentMask


@dataclass(frozen=True)
class Sums:
    """What evaluation counts; sums of sets add up."""

    nll: float
    num_tokens: int
    num_bytes: int

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.nll + other.nll, self.num_tokens + other.num_tokens, self.num_bytes + other.num_bytes)

    def metrics(self, prefix: str) -> dict[str, Any]:
        """loss in nats per token, perplexity, bits per byte."""
        loss = self.nll / self.num_tokens
        return {
            f"{prefix}_loss": loss,
            f"{prefix}_perplexity": math.exp(min(loss, 700.0)),
            f"{prefix}_bits_per_byte": self.nll / math.log(2) / self.num_bytes if self.num_bytes else None,
            f"{prefix}_num_tokens": self.num_tokens,
            f"{prefix}_num_bytes": self.num_bytes,
        }


@torch.no_grad()
def sum_losses(
    forward: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    rows: ValidationRows,
    token_bytes: np.ndarray,
    batch_rows: int,
    device: torch.device,
    rank: int = 0,
    num_processes: int = 1,
    mask: DocumentMask | None = None,
) -> Sums:
    """Sum the losses of one validation set over all ranks.

    Args:
        forward: micro-batch -> summed NLL over its targets that are not -100 (a scalar tensor).
        rows: the set.
        token_bytes: UTF-8 bytes of each token id, control tokens 0.
        batch_rows: rows per forward and device; only speed and memory depend on it.
        device: where the model is.
        rank, num_processes: rank r takes batches r, r + P, ...; every rank does the same number of forwards, which
            sharded models need, the surplus ones without a target. With tensor parallelism a group has one rank here.
        mask: document masking as in training; first tokens of documents are no targets and count nowhere.
    """
    num_batches = math.ceil(rows.num_rows / batch_rows)
    total = torch.zeros(3, dtype=torch.float64)
    for first_batch in range(0, num_batches, num_processes):
        inputs, targets = rows.read((first_batch + rank) * batch_rows, batch_rows)
        batch = as_batch(inputs, targets, mask)
        targets = batch["shift_labels"].numpy()
        valid = targets != NO_TARGET
        on_device = {name: v.to(device) if torch.is_tensor(v) else v for name, v in batch.items()}
        total[0] += forward(on_device).double().cpu()
        total[1] += int(valid.sum())
        total[2] += int(token_bytes[targets[valid]].sum())
    if num_processes > 1:
        total = total.to(device)
        dist.all_reduce(total)
        total /= dist.get_world_size() // num_processes  # the same rows several times
    nll, num_tokens, num_bytes = total.tolist()
    return Sums(nll, int(num_tokens), int(num_bytes))


def evaluate_sets(sets: list[ValidationRows], sum_one: Callable[[ValidationRows], Sums]) -> dict[str, Any]:
    """Evaluate each named set; `eval_*` is over all of them together, `eval_<name>_*` each when there are several."""
    started_at = time.perf_counter()
    sums = {rows.name: sum_one(rows) for rows in sets}
    overall = sum(sums.values(), Sums(0.0, 0, 0))
    metrics = overall.metrics("eval")
    if len(sums) > 1:
        for name, one in sums.items():
            metrics |= one.metrics(f"eval_{name}")
    metrics["eval_time_s"] = time.perf_counter() - started_at
    return metrics
