"""The precision of a run, decided before the model exists.

In: the checked training section, the machine. Out: fp32, bf16 or fp16, and why; what cannot be is a recipe's problem.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from clm.divided import is_engine_used

if TYPE_CHECKING:
    from clm.recipe import Recipe

FP8_CAPABILITY = (8, 9)  # Ada and Hopper are the first with fp8 matrix products
FP8_PARAMETERS = 1_000_000_000  # smaller matrices lose more to the casts than their products win


def has_gpu(training: dict[str, Any]) -> bool:
    """Whether the run uses a CUDA GPU."""
    import torch

    return torch.cuda.is_available() and not training.get("use_cpu", False)


def choose_precision(training: dict[str, Any], problems: Any) -> tuple[str, str]:
    """bf16 where the GPU has it, else fp32; what the recipe says is obeyed or refused."""
    import torch

    if training.get("bf16") and training.get("fp16"):
        problems.add("training.fp16", "is true together with training.bf16. Choose one; bf16 needs no loss scaling.")
    if training.get("fp16"):
        if not has_gpu(training):
            problems.add("training.fp16", "is true but there is no CUDA GPU. Remove it.")
        return "fp16", "training.fp16 is true"
    if training.get("bf16") is not None:
        return ("bf16" if training["bf16"] else "fp32"), f"training.bf16 is {str(training['bf16']).lower()}"
    if not has_gpu(training):
        return "fp32", "there is no CUDA GPU"
    if torch.cuda.is_bf16_supported():
        return "bf16", f"{torch.cuda.get_device_name()} has it; weights stay fp32"
    return "fp32", f"{torch.cuda.get_device_name()} has no bf16"


def check_fp8(recipe: Recipe, training: dict[str, Any], num_parameters: int, precision: str, is_compiled: bool) -> None:
    """Refuse model.fp8 where it cannot work or cannot pay; problems go to recipe.problems.

    Args:
        num_parameters: 0 in a dry run whose base model is not here.
        precision: of the run, without fp8.
    """
    import torch

    if not recipe.model.fp8:
        return
    reasons = []
    if find_spec("torchao") is None:
        reasons.append("torchao is not installed. Run pip install -c constraints.txt -e '.[torchao]'")
    if not has_gpu(training):
        reasons.append("there is no CUDA GPU. Remove it")
    elif torch.cuda.get_device_capability() < FP8_CAPABILITY:
        reasons.append(f"{torch.cuda.get_device_name()} has no fp8 (capability 8.9 or higher). Remove it")
    if 0 < num_parameters < FP8_PARAMETERS:
        reasons.append(
            f"the model has {num_parameters:,} parameters: below {FP8_PARAMETERS:,} its matrices are so small that the "
            "casts cost more than fp8 products win. Remove it"
        )
    if precision != "bf16":
        reasons.append(f"the precision is {precision}, and what is not fp8 must be bf16. Set training.bf16: true")
    if not is_compiled:
        reasons.append("the model is not compiled, without which the casts are slow. Set training.torch_compile: true")
    if is_engine_used(training):
        reasons.append("it is not tested with divided weights (DeepSpeed, FSDP, tensor parallelism). Use DDP")
    if recipe.data.document_mask:
        reasons.append(
            "data.document_mask is true: a micro-batch has one scale, so a document's numbers would depend on the "
            "others in it. Remove one of them"
        )
    rows = training.get("per_device_train_batch_size")
    if isinstance(rows, int) and rows * recipe.data.block_size % 16:
        reasons.append(f"a micro-batch has {rows} x {recipe.data.block_size} tokens, which 16 must divide. Change one")
    for reason in reasons:
        recipe.problems.add("model.fp8", f"is true but {reason}.")
