"""What `run.speed` turns on for one run, and what it leaves to transformers; decided before the model exists.

In: the recipe, the checked training section, the model's config, the machine. Out: a `Speed`.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clm.attention import choose_attention, needs_mask
from clm.divided import is_deepspeed_used, is_engine_used, is_fsdp
from data_prep.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from clm.recipe import Recipe

SPEEDS = ("fast", "stock")
LOSSES = ("auto", "whole", "chunked")


@dataclass(frozen=True)
class Speed:
    """How a run computes.

    `is_fast`: our training step and collation. `loss`: how the loss-only forward computes (clm/loss_only.py), or None
    where the model's own forward returns loss and logits. `compiled`: torch.compile.
    """

    is_fast: bool
    loss: str | None
    loss_reason: str
    compiled: bool
    compiled_reason: str
    attention: str
    attention_reason: str

    def describe(self) -> dict[str, Any]:
        """For the resolved recipe."""
        return {"is_fast": self.is_fast, "loss": self.loss or "the model's own", "compiled": self.compiled}


def choose_speed(
    recipe: Recipe,
    training: dict[str, Any],
    config: PretrainedConfig | None,
    block_size: int,
    precision: str,
    has_gpu: bool,
) -> Speed:
    """Decide it; what cannot be goes to recipe.problems.

    Args:
        config: None in a dry run whose base model is not here.
        block_size: the longest row of any stage.
    """
    is_fast = recipe.run.speed == "fast"
    _check_optimizer(recipe, training)
    if recipe.model.residual_dtype == "bf16" and precision != "bf16":
        recipe.problems.add(
            "model.residual_dtype", f"is bf16 but the precision is {precision}. Set training.bf16: true, or remove it."
        )
    compiled, why_compiled = _choose_compile(training, is_fast, has_gpu)
    loss, why_loss = _choose_loss(recipe, training, config, is_fast, compiled)
    why_masked = needs_mask(config, block_size)
    if not is_fast:
        why_masked = "run.speed is stock"
    elif loss is None:  # the model's own forward may be called with padding
        why_masked = why_loss
    attention, why_attention = "sdpa", ""
    try:
        attention, why_attention = choose_attention(
            recipe.model.attention, precision == "bf16", has_gpu, recipe.data.document_mask, why_masked
        )
    except UserError as error:
        recipe.problems.messages.append(str(error))
    if not is_fast and recipe.data.document_mask and attention.startswith("flash_attention"):
        recipe.problems.add(
            "run.speed",
            f"is stock but model.attention is {attention} and data.document_mask is true: transformers' collator "
            "cannot give FlashAttention the borders of documents. Set model.attention: sdpa, or run.speed: fast.",
        )
    return Speed(is_fast, loss, why_loss, compiled, why_compiled, attention, why_attention)


def _check_optimizer(recipe: Recipe, training: dict[str, Any]) -> None:
    if recipe.run.optimizer != "muon":
        return
    optim = training.get("optim", "adamw_torch_fused")
    if optim not in ("adamw_torch", "adamw_torch_fused"):
        recipe.problems.add(
            "training.optim",
            f"is {optim} but run.optimizer is muon, beside which AdamW is torch's. Remove one of them.",
        )
    if is_deepspeed_used(training):
        recipe.problems.add(
            "run.optimizer",
            "is muon but DeepSpeed makes the update, of flat parts of the weights, and Muon needs whole matrices. Use "
            "DDP or FSDP2, or run.optimizer: trainer.",
        )
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        recipe.problems.add(
            "run.optimizer",
            "is muon but the launcher's fsdp_offload_params keeps the weights on the CPU, which is too slow for its "
            "iteration. Switch that off, or use run.optimizer: trainer.",
        )


def _choose_compile(training: dict[str, Any], is_fast: bool, has_gpu: bool) -> tuple[bool, str]:
    keys = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
    if any(training.get(key) is not None for key in keys):
        on = bool(training.get("torch_compile") or training.get(keys[1]) or training.get(keys[2]))
        return on, "as the recipe says"
    if not is_fast:
        return False, "Trainer's default"
    if not has_gpu:
        return False, "on a CPU compiling takes longer than a short run; training.torch_compile: true for a long one"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")):
        return False, "torch.compile needs a C compiler, and there is none"
    if is_engine_used(training):
        return False, "weights are sharded; training.torch_compile: true compiles all the same"
    return True, "there is a GPU; training.torch_compile: false switches it off"


def _choose_loss(
    recipe: Recipe, training: dict[str, Any], config: PretrainedConfig | None, is_fast: bool, compiled: bool
) -> tuple[str | None, str]:
    from clm.loss_only import MODEL_TYPES

    wanted = recipe.run.loss
    kind = getattr(config, "model_type", None)
    why_not = None
    if not is_fast:
        why_not = "run.speed is stock"
    elif training.get("use_liger_kernel"):
        why_not = "training.use_liger_kernel is true, whose own loss is used"
    elif kind is not None and kind not in MODEL_TYPES:
        why_not = f"the loss-only forward has not been compared with that of a {kind} model"
    if why_not is not None:
        if wanted != "auto":
            recipe.problems.add("run.loss", f"is {wanted} but {why_not}. Remove it.")
        if recipe.run.z_loss:
            recipe.problems.add(
                "run.z_loss",
                f"is {recipe.run.z_loss:g} but the model's own forward computes the loss ({why_not}), and it knows no "
                "z-loss. Remove it.",
            )
        return None, why_not
    why_whole = None
    if is_deepspeed_used(training) or is_fsdp():
        why_whole = "weights are sharded, and the head's is whole only while the head is called"
    elif compiled:
        why_whole = "torch.compile fuses it, and leaves a compiled model to compute a chunked one"
    if wanted == "chunked" and why_whole is not None:
        recipe.problems.add("run.loss", f"is chunked but {why_whole}. Set run.loss: whole, or leave it out.")
    if wanted == "auto":
        return ("chunked", "not compiled, so it is faster and smaller") if why_whole is None else ("whole", why_whole)
    return wanted, "as the recipe says"
