"""What autocast leaves in fp32 and need not, a mixture's experts and the residual stream; and products in fp8.

In: a model. Out: the same model; weights, gradients and optimizer state stay fp32.

Experts: transformers multiplies all at once by grouped_mm, which autocast does not know, so that with fp32 weights
their products, most of such a model's work, run in fp32 (transformers/integrations/moe.py, _grouped_mm), and compiled
by a loop in Python. `grouped_mm_autocast` is the same function with weights and input cast first.
Residual stream: the embedding's output is fp32, and so is every sum of the stream; cast there, all of it is bf16. That
changes the numbers a little, so it is a choice (`model.residual_dtype`).
fp8: torchao casts input, weight and gradient of a Linear to 8 bits with one scale each, worked out anew in each step
(`model.fp8`). Keys and files stay those of plain Linear modules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPERTS = "grouped_mm_autocast"
ROUTERS = ("gate", "router")


def use_autocast_experts(model: PreTrainedModel) -> bool:
    """Let a mixture's experts follow autocast; False where the model has none by that interface."""
    if getattr(model.config, "_experts_implementation", None) != "grouped_mm":
        return False
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(EXPERTS, _experts_forward)
    model.set_experts_implementation(EXPERTS)
    return True


def _experts_forward(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """transformers' grouped_mm_experts_forward, in autocast's dtype where autocast is on."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    kind = hidden_states.device.type
    if not torch.is_autocast_enabled(kind):
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    dtype = torch.get_autocast_dtype(kind)
    cast = {name: parameter.to(dtype) for name, parameter in self.named_parameters(recurse=False)}
    with torch.autocast(kind, enabled=False):  # comes back here, with these weights in the place of its own
        return torch.func.functional_call(self, cast, (hidden_states.to(dtype), top_k_index, top_k_weights))


def use_fp8(model: PreTrainedModel, emulate: bool = False) -> list[str]:
    """Multiply in fp8 in the Linear modules of the blocks; the head, routers and fused experts stay as they are.

    Args:
        emulate: compute with fp8's numbers on hardware without fp8 (slow, for tests).
    Returns:
        The names of these modules.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    head, names = model.get_output_embeddings(), []

    def is_chosen(module: torch.nn.Module, name: str) -> bool:
        if module is head or name.endswith(ROUTERS) or module.in_features % 16 or module.out_features % 16:
            return False
        names.append(name)
        return True

    convert_to_float8_training(model, module_filter_fn=is_chosen, config=Float8LinearConfig(emulate=emulate))
    return names


def cast_residual_stream(model: PreTrainedModel) -> None:
    """Under autocast the embedding gives autocast's dtype, and every sum of the residual stream follows."""
    model.get_input_embeddings().register_forward_hook(_cast)


def _cast(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    kind = output.device.type
    return output.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else output
