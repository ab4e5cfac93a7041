"""Sums of gradients over processes that a resume does not change.

PyTorch's DDP adds gradients up bucket by bucket. In the first backward after a start all parameters are in one bucket;
then it cuts them anew, in the order in which gradients came (torch/nn/parallel/distributed.py, "rebuild_buckets"). With
more than two processes the place in a bucket decides in which order the terms of a sum are added, so the first step
after a resume would be rounded otherwise than in the uninterrupted run. One forward and backward whose gradients are
thrown away, at every start, and all steps have the same buckets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.parallel import DistributedDataParallel

from clm.dataset import as_batch

if TYPE_CHECKING:
    from clm.trainer import ClmTrainer


def settle_buckets(trainer: ClmTrainer) -> None:
    """Have DDP cut its buckets before the first step; nothing else changes, random state included.

    Other than under DDP, and with one or two processes, there is nothing to do.
    """
    model, plan, device = trainer.model_wrapped, trainer.plan, trainer.args.device
    if not isinstance(model, DistributedDataParallel) or trainer.args.world_size <= 2:
        return
    rows = trainer.train_dataset.__getitems__(list(range(plan.samples_per_micro_batch)))
    batch = trainer._prepare_inputs(as_batch(*rows.split(), plan.document_mask))
    with torch.random.fork_rng([device] if device.type == "cuda" else []), trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(model, batch, num_items_in_batch=batch["shift_labels"].numel())
        loss.backward()
    model.zero_grad(set_to_none=True)
