"""How this launch divides the weights among processes, as the launcher's environment and the recipe say.

In: what accelerate's launcher has set. Out: whether it is DeepSpeed, FSDP2, tensor parallelism, and in how many parts.
"""

from __future__ import annotations

import os
from typing import Any


def tp_size() -> int:
    """Processes that share one copy of each layer; 1 without tensor parallelism."""
    return int(os.environ.get("PARALLELISM_CONFIG_TP_SIZE", "1"))


def is_fsdp() -> bool:
    """Whether the launcher asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def is_deepspeed_launch() -> bool:
    """Whether the launcher asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def is_deepspeed_used(training: dict[str, Any]) -> bool:
    """Whether DeepSpeed owns the weights: the recipe or the launcher asks for it."""
    return bool(training.get("deepspeed")) or is_deepspeed_launch()


def is_divided() -> bool:
    """Whether each process of this launch holds a part of the weights in DTensors: FSDP2 or tensor parallelism."""
    return is_fsdp() or tp_size() > 1


def is_engine_used(training: dict[str, Any]) -> bool:
    """Whether the weights are divided among processes: DeepSpeed, FSDP or tensor parallelism."""
    return is_deepspeed_used(training) or is_divided()
