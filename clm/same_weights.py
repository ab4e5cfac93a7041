"""The first weights of a run as one number, the same under every launcher, and the same on all processes.

In: a trainer before its first step. Out: a line in the log, or a UserError that names processes whose weights differ.
A parameter counts by the sum of its elements' bits, so processes that hold shards add up to what one process has.
"""

from __future__ import annotations

import hashlib
import resource
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object

from clm.fsdp import is_own_shard, local_of
from clm.metrics import log
from data_prep.errors import UserError
from data_prep.sizes import format_bytes

if TYPE_CHECKING:
    from clm.trainer import ClmTrainer


def check_first_weights(trainer: ClmTrainer) -> str:
    """Say and return the hash of the weights. A collective.

    Raises:
        UserError: whole weights differ between processes; names those that have others than process 0.
    """
    args, parameters = trainer.args, dict(trainer.model.named_parameters())
    is_divided = any(hasattr(p, "device_mesh") or hasattr(p, "ds_tensor") for p in parameters.values())
    sums = torch.stack([_sum_of_bits(p, args.process_index) for p in parameters.values()])
    sums = sums.to(args.device)
    if is_divided and args.world_size > 1:
        dist.all_reduce(sums)
    content = [
        (name, list(getattr(p, "ds_shape", p.shape)), number)
        for (name, p), number in zip(parameters.items(), sums.tolist(), strict=True)
    ]
    own = hashlib.sha256(repr(content).encode()).hexdigest()[:16]
    answer = (own, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    hashes, peaks = zip(*(gather_object([answer]) if args.world_size > 1 else [answer]), strict=True)
    others = [rank for rank, value in enumerate(hashes) if value != hashes[0]]
    if others:
        raise UserError(
            f"The first weights of process {', '.join(map(str, others))} are not those of process 0, though code, "
            "versions and recipe are the same. Its base model's files may differ (model.init), or its hardware "
            "computes wrongly. Nothing was trained."
        )
    everywhere = f", the same on {args.world_size} processes" if args.world_size > 1 else ""
    log.info("first weights %s%s; peak of host memory so far %s", own, everywhere, format_bytes(max(peaks)))
    return own


def check_copies(trainer: ClmTrainer) -> None:
    """What each process of a tensor-parallel group holds whole (embedding, head, norms) is not sent around: all make
    the same update. Compare it before a save. A collective.

    Raises:
        UserError: it differs; names processes and parameters.
    """
    if trainer.plan.tp_size == 1:
        return
    mesh = trainer.accelerator.torch_device_mesh["tp"]
    copied = {
        name: parameter
        for name, parameter in trainer.model.named_parameters()
        if parameter.placements[parameter.device_mesh.mesh_dim_names.index("tp")].is_replicate()
    }
    own = torch.stack([_sum_of_bits(local_of(p), 0) for p in copied.values()]).to(trainer.args.device)
    lowest, highest = own.clone(), own.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN, mesh.get_group())
    dist.all_reduce(highest, dist.ReduceOp.MAX, mesh.get_group())
    differ = [name for name, is_one in zip(copied, (lowest == highest).tolist(), strict=True) if not is_one]
    found = gather_object([differ])
    if any(found):
        ranks = [rank for rank, names in enumerate(found) if names]
        raise UserError(
            f"Weights that processes {', '.join(map(str, ranks))} hold alike are not the same any more: "
            f"{', '.join(found[ranks[0]][:5])}. A device computes wrongly, or otherwise each time. Nothing was saved; "
            "the same command goes on from the newest checkpoint. Set training.full_determinism: true, or look at "
            "these processes' devices."
        )


def _sum_of_bits(parameter: Any, rank: int) -> torch.Tensor:
    if hasattr(parameter, "ds_tensor"):  # ZeRO stage 3: equal parts of the flat parameter, the last one padded
        size = parameter.ds_tensor.numel()
        values = parameter.ds_tensor.detach().flatten()[: max(0, min(size, parameter.ds_numel - rank * size))]
    elif hasattr(parameter, "device_mesh") and not is_own_shard(parameter):
        values = local_of(parameter)[:0]  # of another copy of HSDP
    else:
        values = local_of(parameter)
    bits = values.contiguous().view(torch.int32).flatten()
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for piece in bits.split(2**16):  # torch makes an int64 copy of what it adds up; small ones leave no holes
        total += piece.sum(dtype=torch.int64)
    return total.cpu()
