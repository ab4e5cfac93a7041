"""Muon for the hidden matrices and AdamW for everything else, as one optimizer (`run.optimizer: muon`).

In: a model. Out: an Optimizer whose groups each hold their own learning rate, which the schedule scales alike. Which
parameter goes where (each into exactly one group):

    Muon      matrices of the blocks; a fused (experts, out, in) tensor is that many matrices
    AdamW     embeddings, output head, routers, with weight decay; norms and biases, without

Muon makes the update of a matrix orthogonal by five steps of a Newton-Schulz iteration in bf16. The formula and its
constants are those of torch.optim.Muon, which takes 2-D parameters only and one at a time; here matrices of one shape
are stacked and go through the iteration together, wide products instead of many small ones. Under FSDP2 each matrix is
put together on one rank for it (clm/muon_sharded.py).

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; torch/optim/_muon.py.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import AdamW, Optimizer

from clm.fsdp import local_of
from clm.muon_sharded import orthogonalize_divided, shard_group

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of torch.optim.Muon
NUM_ITERATIONS = 5
SMALLEST_NORM = 1e-7
STACK_ELEMENTS = 2**27  # at most so many in one rank's stack: 256 MiB in bf16, and about three times that at work
ROUTERS = ("gate.weight", "router.weight")


@dataclass(frozen=True)
class Groups:
    """The names of a model's parameters by what becomes of them."""

    muon: list[str]
    adamw_decayed: list[str]
    adamw: list[str]


def group_parameters(model: nn.Module) -> Groups:
    """Sort every trainable parameter into one group; tied ones appear once, under their first name."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        embeddings.add(id(head.weight))
    groups = Groups([], [], [])
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dim() < 2:
            groups.adamw.append(name)
        elif id(parameter) in embeddings or name.endswith(ROUTERS) or parameter.dim() > 3 or name.endswith("bias"):
            groups.adamw_decayed.append(name)
        else:
            groups.muon.append(name)
    return groups


def make_optimizer(
    model: PreTrainedModel, adamw: dict[str, Any], weight_decay: float, muon: dict[str, Any]
) -> MuonAdamW:
    """The optimizer of a model.

    Args:
        adamw: arguments of torch.optim.AdamW for its part: lr, betas, eps, fused.
        weight_decay: of AdamW's matrices.
        muon: learning_rate, momentum, weight_decay and adjust (`adjusted_rate`) of Muon's part.
    """
    groups, parameters = group_parameters(model), dict(model.named_parameters())
    muon = {"lr" if name == "learning_rate" else name: value for name, value in muon.items()}
    return MuonAdamW(
        [parameters[name] for name in groups.muon],
        [
            {"params": [parameters[name] for name in groups.adamw_decayed], "weight_decay": weight_decay},
            {"params": [parameters[name] for name in groups.adamw], "weight_decay": 0.0},
        ],
        muon,
        adamw,
    )


class MuonAdamW(Optimizer):
    """AdamW's groups first, so that the logged learning rate is training.learning_rate; Muon's is the last.

    Args:
        matrices: for Muon, of 2 or 3 dimensions.
        others: groups for AdamW.
        muon: lr, momentum, weight_decay, adjust.
        adamw: arguments of torch.optim.AdamW.
    """

    def __init__(
        self, matrices: list[nn.Parameter], others: list[dict[str, Any]], muon: dict[str, Any], adamw: dict[str, Any]
    ):
        assert all(p.dim() in (2, 3) for p in matrices)
        self.adamw = AdamW([group for group in others if group["params"]], **adamw)
        groups = [{**group, "is_muon": False} for group in self.adamw.param_groups]
        if matrices:
            groups.append({"params": matrices, **muon, "is_muon": True})
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One update of every parameter that has a gradient."""
        assert closure is None
        # a loaded state dict brings new groups and a new state
        self.adamw.param_groups = [group for group in self.param_groups if not group["is_muon"]]
        self.adamw.state = self.state
        self.adamw.step()
        for group in self.param_groups:
            if group["is_muon"]:
                self._step_muon(group)

    def _step_muon(self, group: dict[str, Any]) -> None:
        stacks: dict[Any, list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                stacks[parameter.shape[-2:], parameter.device, parameter.dim()].append(parameter)
        for (shape, *_), parameters in stacks.items():
            batch: list[nn.Parameter] = []
            num_elements = 0
            ranks = dist.get_world_size(shard_group(parameters[0])) if _is_divided(parameters[0]) else 1
            for parameter in parameters:
                if batch and num_elements + parameter.numel() > STACK_ELEMENTS * ranks:
                    self._update(batch, shape, group)
                    batch, num_elements = [], 0
                batch.append(parameter)
                num_elements += parameter.numel()
            self._update(batch, shape, group)

    def _update(self, parameters: list[nn.Parameter], shape: torch.Size, group: dict[str, Any]) -> None:
        momentum, rate = group["momentum"], group["lr"]
        wished = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter.grad)
            grad, buffer = local_of(parameter.grad), local_of(state["momentum_buffer"])
            buffer.lerp_(grad, 1 - momentum)
            wished.append(grad.lerp(buffer, momentum).bfloat16())
        if _is_divided(parameters[0]) and parameters[0].dim() == 2:
            updates = orthogonalize_divided(wished, shape[0], shard_group(parameters[0]), orthogonalize)
        else:  # whole, or divided by experts
            stacked = [each.view(-1, *shape) for each in wished]
            updates = orthogonalize(torch.cat(stacked)).split([len(each) for each in stacked])
        by_shape = adjusted_rate(rate, group["adjust"], shape)
        for parameter, update in zip(parameters, updates, strict=True):
            own = local_of(parameter)
            own.mul_(1 - rate * group["weight_decay"])
            own.add_(update.view_as(own), alpha=-by_shape)


def _is_divided(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "device_mesh")


def orthogonalize(stack: torch.Tensor) -> torch.Tensor:
    """(n, rows, columns) in bf16 -> matrices with about the same singular vectors and all singular values near 1.

    Source: torch/optim/_muon.py, _zeropower_via_newtonschulz, for each matrix of the stack.
    """
    a, b, c = COEFFICIENTS
    is_tall = stack.shape[-2] > stack.shape[-1]
    x = stack.mT if is_tall else stack
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def adjusted_rate(rate: float, adjust: str, shape: torch.Size) -> float:
    """The learning rate of a (rows, columns) matrix.

    `original`: rate x sqrt(max(1, rows / columns)), Jordan et al. `match_rms_adamw`: rate x 0.2 x sqrt(max(rows,
    columns)), with which AdamW's rate and weight decay can be kept (Liu et al., "Muon is Scalable for LLM Training").
    """
    rows, columns = shape
    if adjust == "match_rms_adamw":
        return rate * 0.2 * math.sqrt(max(rows, columns))
    return rate * math.sqrt(max(1.0, rows / columns))
