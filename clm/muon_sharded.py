"""Muon's update where FSDP2 has divided the matrices: each is put together on one rank, made orthogonal, and sent back.

In: this rank's rows of the momentum of matrices of one shape. Out: its rows of their updates. Rank r of n takes the
matrices r, r + n, ...; one exchange (all-to-all) in bf16 brings it their rows from all ranks, and another one takes the
updates back, so each matrix is computed once and whole, as one process would. A fused (experts, out, in) tensor is
divided by experts, whose matrices are whole already: nothing is sent.

Source of the way to share the work: Liu et al., "Muon is Scalable for LLM Training", 2025, section 2.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

Orthogonalize = Callable[[torch.Tensor], torch.Tensor]  # (n, rows, columns) -> the same


def local_rows(num_rows: int, num_ranks: int, rank: int) -> int:
    """How many of a matrix's rows a rank holds: parts as torch.chunk cuts them, the last ones smaller or empty."""
    part = -(-num_rows // num_ranks)
    return min(part, max(0, num_rows - rank * part))


def shard_group(tensor: Any) -> dist.ProcessGroup:
    """The ranks among which a DTensor is divided; with HSDP those of one copy, and each copy does the same."""
    mesh = tensor.device_mesh
    (dimension,) = (i for i, placement in enumerate(tensor.placements) if placement.is_shard())
    assert tensor.placements[dimension].dim == 0, "FSDP2 divides the first dimension"
    return mesh.get_group(dimension)


def orthogonalize_divided(
    rows: list[torch.Tensor], num_rows: int, group: dist.ProcessGroup, orthogonalize: Orthogonalize
) -> list[torch.Tensor]:
    """This rank's rows of the orthogonal matrices. A collective: all ranks give the same matrices in the same order.

    Args:
        rows: of each matrix, (this rank's rows, columns) in bf16.
        num_rows: of a whole matrix.
    """
    num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    columns = rows[0].shape[-1]
    sizes = [local_rows(num_rows, num_ranks, each) for each in range(num_ranks)]
    assert all(part.shape == (sizes[rank], columns) for part in rows)
    num_owned = [len(rows[owner::num_ranks]) for owner in range(num_ranks)]  # matrices that each rank puts together
    to_owners = [sizes[rank] * columns * count for count in num_owned]
    from_ranks = [size * columns * num_owned[rank] for size in sizes]
    sent = torch.cat([part.reshape(-1) for owner in range(num_ranks) for part in rows[owner::num_ranks]])
    received = sent.new_empty(sum(from_ranks))
    dist.all_to_all_single(received, sent, from_ranks, to_owners, group=group)
    mine = num_owned[rank]
    if mine:
        parts = [part.view(mine, n, columns) for n, part in zip(sizes, received.split(from_ranks), strict=True)]
        updates = orthogonalize(torch.cat(parts, dim=1))
        received = torch.cat([part.reshape(-1) for part in updates.split(sizes, dim=1)])
    dist.all_to_all_single(sent, received.contiguous(), to_owners, from_ranks, group=group)
    done: list[torch.Tensor] = [rows[0]] * len(rows)
    for owner, part in enumerate(sent.split(to_owners)):
        done[owner::num_ranks] = part.view(num_owned[owner], sizes[rank], columns).unbind()
    return done
