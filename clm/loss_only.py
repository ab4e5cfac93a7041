"""A forward that returns the loss and no logits, put on a model in the place of transformers' own.

In: a transformers model for causal language modelling. Out: the same model; a call with `shift_labels` gives a loss,
any other call is transformers' forward, unchanged.

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
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from clm.attention import with_masks
from clm.dataset import IGNORE

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


def install(model: PreTrainedModel, way: str) -> None:
    """Give this one model the forward; its class, names and files stay as they are.

    Args:
        way: whole or chunked.
    """
    assert way in WAYS and model.config.model_type in MODEL_TYPES
    model.loss_only = way
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
    **kwargs: Any,
) -> Any:
    """The mean loss of (B, T) `shift_labels`, or, with `num_items_in_batch`, their sum divided by it.

    Args:
        labels: not needed, not used beside shift_labels.
        output_router_logits: compute the router loss of a mixture of experts; None: as the config says. It is returned
            apart, as `aux_loss`, without its coefficient.
        return_logits: logits instead of a loss, by the same way through the model (for clm/document_mask.py).
        kwargs: for the model's body, e.g. position_ids.
    """
    if shift_labels is None and not return_logits:
        kwargs |= {"labels": labels, "num_items_in_batch": num_items_in_batch}
        if output_router_logits is not None:
            kwargs["output_router_logits"] = output_router_logits
        return _stock_forward(self, input_ids, {name: v for name, v in kwargs.items() if v is not None})
    from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

    kwargs["use_cache"] = False
    if output_router_logits is None:
        output_router_logits = getattr(self.config, "output_router_logits", False)
    if output_router_logits:
        kwargs["output_router_logits"] = True
    outputs = self.base_model(input_ids=input_ids, **kwargs)
    if return_logits:
        return CausalLMOutputWithPast(logits=self.lm_head(outputs.last_hidden_state))
    loss = _sum_of_losses(self, outputs.last_hidden_state, shift_labels)
    if num_items_in_batch is None:
        num_items_in_batch = (shift_labels != IGNORE).sum()
    loss = loss / num_items_in_batch
    if not output_router_logits:
        return CausalLMOutputWithPast(loss=loss)
    balancing = sys.modules[type(self).__module__].load_balancing_loss_func
    aux = balancing(outputs.router_logits, self.num_experts, self.num_experts_per_tok, None)
    return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux)


def _stock_forward(self: PreTrainedModel, input_ids: torch.Tensor | None, kwargs: dict[str, Any]) -> Any:
    """transformers' own, with masks: whoever calls it may have padding or a cache."""
    with with_masks(self.config):
        return type(self).forward(self, input_ids=input_ids, **kwargs)


def _sum_of_losses(self: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross entropy in fp32 over the targets that are not -100; hidden (B, T, H), targets (B, T)."""
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    if self.loss_only == "whole" or not torch.is_grad_enabled():
        return F.cross_entropy(self.lm_head(hidden).float(), targets, reduction="sum")
    chunk_rows = CHUNK_ROWS_GPU if hidden.device.type == "cuda" else CHUNK_ROWS
    return ChunkedLoss.apply(hidden, self.lm_head.weight, self.lm_head.bias, targets, chunk_rows)


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
    ) -> torch.Tensor:
        """The loss, a scalar in fp32; hidden (N, H), weight (V, H), bias (V,), targets (N,) int64."""
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        used_hidden, used_weight = hidden.detach().to(dtype), weight.detach().to(dtype)
        used_bias = None if bias is None else bias.detach().to(dtype)
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        bias_grad = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        with torch.autocast(kind, enabled=False):
            for first in range(0, len(targets), chunk_rows):
                here = slice(first, first + chunk_rows)
                rows, labels = used_hidden[here], targets[here]
                log_p = F.linear(rows, used_weight, used_bias).float().log_softmax(dim=1)
                is_target = (labels != IGNORE)[:, None]
                index = labels.clamp(min=0)[:, None]
                total -= (log_p.gather(1, index) * is_target).sum()
                by_logits = log_p.exp_()  # softmax minus one at the target: the gradient of the loss by the logits
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
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of forward, scaled, by hidden, weight and bias."""
        hidden_grad, weight_grad, bias_grad = ctx.saved_tensors
        for_bias = None if bias_grad is None else (bias_grad * by_loss).to(ctx.dtypes[1])
        return hidden_grad.mul_(by_loss), weight_grad.mul_(by_loss).to(ctx.dtypes[0]), for_bias, None, None
