"""A forward that returns the loss and no logits, put on a model in the place of transformers' own.

In: a transformers model for causal language modelling. Out: the same model; a call with `shift_labels` gives a loss,
any other call is transformers' forward, unchanged. In training it may add the z-loss, which keeps logits from drifting.

transformers returns (B, T, V) logits beside the loss: the largest tensor of a training, kept through the whole
backward, copied to fp32 by accelerate, and under torch.compile given a gradient of zeros of that size. Here it ends
where the loss is computed. Two ways to compute it:

    whole     head and cross entropy over all rows at once, as transformers does; torch.compile fuses what comes after
    chunked   some rows at a time, and their gradients with them, so that never more than a chunk's logits exist

PyTorch 2.13 has the second as torch.nn.functional.linear_cross_entropy. It is not used: in bf16 it rounds the loss
itself to 8 bits, which would show in every curve, and older versions lack it.

Replaces: `forward` of the model's class (transformers/models/<type>/modeling_<type>.py) and ForCausalLMLoss
(transformers/loss/loss_utils.py). Both are compared with those for every type below (tests/clm/test_loss_only.py).
"""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers.utils import ModelOutput

from clm.attention import with_masks
from data_prep.blocks import NO_TARGET

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Types whose forward is: body, head, cross entropy. Others scale or cap their logits, or have not been compared yet.
MODEL_TYPES = (
    "gemma",
    "gpt2",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "smollm3",
)
CHUNK_ROWS = 512  # on a CPU: their logits stay nearer to the cores (docs/speed.md has times)
CHUNK_ROWS_GPU = 8192  # fewer chunks: each reads and writes the head's gradient once more
WAYS = ("whole", "chunked")


@dataclass
class TrainingLoss(ModelOutput):
    """What the forward returns: `loss` is differentiated. With the z-loss its two parts are there too, detached; a
    mixture's router loss, without its coefficient, is differentiated apart."""

    loss: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    cross_entropy: torch.Tensor | None = None
    z_loss: torch.Tensor | None = None


def install(model: PreTrainedModel, way: str, z_loss: float | None = None) -> None:
    """Give this one model the forward; its class, names and files stay as they are.

    Args:
        way: whole or chunked.
        z_loss: the coefficient of the z-loss, for calls with `with_z_loss`.
    """
    assert way in WAYS and model.config.model_type in MODEL_TYPES
    model.loss_only = way
    model.z_loss = z_loss or 0.0
    # of the module that defines the class, which FSDP2 replaces by one of its own
    model.balancing_loss = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    model.forward = types.MethodType(_forward, model)


def is_installed(model: torch.nn.Module) -> bool:
    """Whether calls of this model, not of what wraps it, may ask for `return_logits`."""
    return getattr(model, "loss_only", None) is not None


def _forward(
    self: PreTrainedModel,
    input_ids: torch.Tensor | None = None,
    shift_labels: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    output_router_logits: bool | None = None,
    return_logits: bool = False,
    with_z_loss: bool = False,
    **kwargs: Any,
) -> Any:
    """The mean loss of (B, T) `shift_labels`, or, with `num_items_in_batch`, their sum divided by it.

    The z-loss is coefficient x (log Z)^2 for each target, Z the sum of exp(logits): it keeps log Z near 0. It is summed
    and divided as the cross entropy is. Source: Chowdhery et al., "PaLM", 2022, section 5.

    Args:
        labels: not needed, not used beside shift_labels.
        output_router_logits: compute the router loss of a mixture of experts; None: as the config says. It is returned
            apart, as `aux_loss`, without its coefficient.
        return_logits: logits instead of a loss, by the same way through the model (for clm/document_mask.py).
        with_z_loss: add the z-loss to the loss; evaluation does not.
        kwargs: for the model's body, e.g. position_ids.
    """
    if shift_labels is None and not return_logits:
        kwargs |= {"labels": labels, "num_items_in_batch": num_items_in_batch}
        if output_router_logits is not None:
            kwargs["output_router_logits"] = output_router_logits
        return _stock_forward(self, input_ids, {name: v for name, v in kwargs.items() if v is not None})
    from transformers.modeling_outputs import CausalLMOutputWithPast

    kwargs["use_cache"] = False
    if output_router_logits is None:
        output_router_logits = getattr(self.config, "output_router_logits", False)
    if output_router_logits:
        kwargs["output_router_logits"] = True
    outputs = self.base_model(input_ids=input_ids, **kwargs)
    if return_logits:
        return CausalLMOutputWithPast(logits=self.lm_head(outputs.last_hidden_state))
    z_coefficient = self.z_loss if with_z_loss else 0.0
    sums = _sum_losses(self, outputs.last_hidden_state, shift_labels, z_coefficient)
    if num_items_in_batch is None:
        num_items_in_batch = (shift_labels != NO_TARGET).sum()
    loss, cross_entropy, z_loss = (None if each is None else each / num_items_in_batch for each in sums)
    aux_loss = None
    if output_router_logits:
        aux_loss = self.balancing_loss(outputs.router_logits, self.num_experts, self.num_experts_per_tok, None)
    return TrainingLoss(loss=loss, aux_loss=aux_loss, cross_entropy=cross_entropy, z_loss=z_loss)


def _stock_forward(self: PreTrainedModel, input_ids: torch.Tensor | None, kwargs: dict[str, Any]) -> Any:
    """transformers' own, with masks: whoever calls it may have padding or a cache."""
    with with_masks(self.config):
        return type(self).forward(self, input_ids=input_ids, **kwargs)


def _sum_losses(
    self: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor, z_coefficient: float
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Summed loss in fp32 over the targets that are not -100, and with a z-loss its parts, cross entropy and z-loss;
    hidden (B, T, H), targets (B, T)."""
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    if self.loss_only == "whole" or not torch.is_grad_enabled():
        logits = self.lm_head(hidden).float()
        cross_entropy = F.cross_entropy(logits, targets, reduction="sum")
        if not z_coefficient:
            return cross_entropy, None, None
        z_loss = z_coefficient * (logits.logsumexp(dim=-1).square() * (targets != NO_TARGET)).sum()
        return cross_entropy + z_loss, cross_entropy.detach(), z_loss.detach()
    chunk_rows = CHUNK_ROWS_GPU if hidden.device.type == "cuda" else CHUNK_ROWS
    # with tensor parallelism a DTensor, whole on each process
    weight, bias = (p.to_local() if hasattr(p, "to_local") else p for p in (self.lm_head.weight, self.lm_head.bias))
    loss, *parts = ChunkedLoss.apply(hidden, weight, bias, targets, chunk_rows, z_coefficient)
    return (loss, *parts) if z_coefficient else (loss, None, None)


class ChunkedLoss(torch.autograd.Function):
    """Head and summed cross entropy, some rows at a time; gradients are made in forward and scaled in backward.

    Matrix products are in autocast's dtype where it is on, sums in fp32. Nothing waits for the device.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        chunk_rows: int,
        z_coefficient: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The loss and its parts, cross entropy and z-loss, which have no gradient; scalars in fp32.

        Args:
            hidden, weight, bias, targets: (N, H), (V, H), (V,), (N,) int64.
        """
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        used_hidden, used_weight = hidden.detach().to(dtype), weight.detach().to(dtype)
        used_bias = None if bias is None else bias.detach().to(dtype)
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        bias_grad = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        cross_entropy, z_loss = torch.zeros(2, dtype=torch.float32, device=hidden.device).unbind()
        with torch.autocast(kind, enabled=False):
            for first in range(0, len(targets), chunk_rows):
                here = slice(first, first + chunk_rows)
                rows, labels = used_hidden[here], targets[here]
                logits = F.linear(rows, used_weight, used_bias).float()
                log_z = logits.logsumexp(dim=1, keepdim=True) if z_coefficient else None
                log_p = logits.log_softmax(dim=1)
                del logits
                is_target = (labels != NO_TARGET)[:, None]
                index = labels.clamp(min=0)[:, None]
                cross_entropy -= (log_p.gather(1, index) * is_target).sum()
                by_logits = log_p.exp_()  # softmax minus one at the target: the gradient of the loss by the logits
                if log_z is not None:  # that of c (log Z)^2 is 2 c log Z x softmax
                    z_loss += z_coefficient * (log_z.square() * is_target).sum()
                    by_logits *= 1 + 2 * z_coefficient * log_z
                by_logits.scatter_add_(1, index, torch.full_like(index, -1, dtype=by_logits.dtype))
                by_logits = by_logits.mul_(is_target).to(dtype)
                hidden_grad[here] = by_logits @ used_weight
                if dtype == torch.float32:
                    weight_grad.addmm_(by_logits.T, rows)
                else:
                    weight_grad += by_logits.T @ rows
                if bias_grad is not None:
                    bias_grad += by_logits.sum(0)
        ctx.save_for_backward(hidden_grad, weight_grad, bias_grad)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(cross_entropy, z_loss)
        return cross_entropy + z_loss, cross_entropy, z_loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_loss: torch.Tensor, *by_parts: None) -> tuple[torch.Tensor | None, ...]:
        """The gradients of forward, scaled, by hidden, weight and bias."""
        hidden_grad, weight_grad, bias_grad = ctx.saved_tensors
        for_bias = None if bias_grad is None else (bias_grad * by_loss).to(ctx.dtypes[1])
        return hidden_grad.mul_(by_loss), weight_grad.mul_(by_loss).to(ctx.dtypes[0]), for_bias, None, None, None
