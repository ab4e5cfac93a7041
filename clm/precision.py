"""The precision of a run, decided before the model exists.

In: the checked training section, the machine. Out: fp32, bf16 or fp16, and why; what cannot be is a recipe's problem.
"""

from __future__ import annotations

from typing import Any


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
