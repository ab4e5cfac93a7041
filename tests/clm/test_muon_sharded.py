"""Muon on divided matrices makes the updates of one process, on any number of ranks and for any shape."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from clm.muon import MuonAdamW
from clm.muon_sharded import local_rows

SETTINGS = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1, "adjust": "original"}
# rows that do not divide, wide and tall, fewer rows than ranks, more matrices of a shape than ranks, experts
SHAPES = [(50, 32), (32, 64), (50, 32), (2, 16), (48, 48), (50, 32), (50, 32), (4, 24, 16), (3, 24, 16)]
NUM_STEPS = 3


def drawn(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def trained(divide) -> list[torch.Tensor]:
    """The weights after some steps; `divide` makes of a whole tensor what this process has of it."""
    parameters = [nn.Parameter(divide(value)) for value in drawn(0)]
    optimizer = MuonAdamW(parameters, [{"params": [nn.Parameter(torch.ones(1))]}], SETTINGS, {})
    for step in range(NUM_STEPS):
        for parameter, grad in zip(parameters, drawn(1 + step), strict=True):
            parameter.grad = divide(grad)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def one_rank(rank: int, num_ranks: int, rendezvous: str, copies: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=num_ranks)
    if copies > 1:
        mesh, placements = init_device_mesh("cpu", (copies, num_ranks // copies)), [Replicate(), Shard(0)]
    else:
        mesh, placements = init_device_mesh("cpu", (num_ranks,)), [Shard(0)]
    whole = trained(lambda value: value.clone())
    divided = trained(lambda value: distribute_tensor(value, mesh, placements))
    for expected, got in zip(whole, divided, strict=True):
        assert (got.full_tensor() - expected).norm() <= 1e-5 * expected.norm(), expected.shape
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks, copies", [(3, 1), (4, 2)], ids=["fsdp", "hsdp"])
def test_divided_matrices_move_as_whole_ones(num_ranks, copies, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = (num_ranks, str(tmp_path / "rendezvous"), copies)
    torch.multiprocessing.spawn(one_rank, arguments, nprocs=num_ranks)


def test_rows_are_cut_as_torch_cuts_them():
    for num_rows in range(1, 12):
        parts = [len(part) for part in torch.arange(num_rows).chunk(4)]
        assert [local_rows(num_rows, 4, rank) for rank in range(4)] == parts + [0] * (4 - len(parts))
