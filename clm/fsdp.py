"""FSDP2: weights, gradients and optimizer state divided among the processes of an `accelerate launch`.

In: a model whose matrices are on the meta device, on every rank. Out: the same model, of which each rank holds its
shards only, filled from a source that gives one full parameter after another. accelerate decides which modules are
wrapped; here is what it leaves open: first weights without a whole model anywhere, and sums of gradients in fp32.
Tensor parallelism (clm/tensor_parallel.py) divides first, alone or within the shards of FSDP2.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from clm.arguments import DEFAULTS
from clm.divided import is_fsdp, tp_size
from clm.host_memory import freed_memory_goes_back
from clm.tensor_parallel import divide
from data_prep.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from clm.recipe import Recipe
    from clm.trainer import ClmTrainer

ON_CPU = "CLM_FSDP_ON_CPU"  # environment variable: try FSDP2 without GPUs
# Optimizers whose state is a tensor of the parameter's shape, element by element: they update a shard as the whole.
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")

Source = Callable[[str, torch.Size], torch.Tensor]  # name and shape of a parameter -> its values, fp32 on the CPU


def check_parallelism(recipe: Recipe) -> None:
    """Refuse launcher files that divide rows among processes; problems go to recipe.problems."""
    for name, what in (("CP", "context parallelism"), ("SP", "sequence parallelism")):
        size = int(os.environ.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1"))
        if size > 1:
            recipe.problems.messages.append(
                f"{recipe.path}: the launcher asks for {what} ({name.lower()}_size {size}), which is not "
                "supported: it cannot be tested without several GPUs, and cuts rows, which the loss and "
                "data.document_mask here do not know. Set it to 1; for long rows use accelerate_configs/tp_fsdp2.yaml, "
                "which divides the heads instead, and training.gradient_checkpointing (docs/scale.md)."
            )


def check_fsdp(recipe: Recipe, training: dict[str, Any], num_processes: int) -> None:
    """Refuse what does not work with FSDP2; problems go to recipe.problems."""
    check_parallelism(recipe)
    if not is_fsdp():
        return
    problems = recipe.problems
    if os.environ.get("FSDP_VERSION") != "2":
        problems.messages.append(
            f"{recipe.path}: the launcher asks for FSDP version {os.environ.get('FSDP_VERSION')}, which PyTorch has "
            "replaced. Write fsdp_version: 2 as in accelerate_configs/fsdp2.yaml."
        )
    if num_processes == 1:
        problems.messages.append(
            f"{recipe.path}: FSDP divides the model among processes but there is one. Use python run_clm.py <recipe>."
        )
    copies, parts = (int(os.environ.get(f"PARALLELISM_CONFIG_DP_{name}_SIZE", 1)) for name in ("REPLICATE", "SHARD"))
    if copies > 1 and tp_size() == 1 and copies * parts != num_processes:
        problems.messages.append(
            f"{recipe.path}: the launcher asks for {copies} copies of the model, each among {parts} processes, "
            f"but there are {num_processes}. Set dp_replicate_size and dp_shard_size in its file so that their product "
            f"is {num_processes}."
        )
    optim = training.get("optim", DEFAULTS["optim"])
    if optim not in OPTIMIZERS:
        problems.add(
            "training.optim",
            f"is {optim}, whose state under FSDP2 is not that of the whole parameter. Use {' or '.join(OPTIMIZERS)}, "
            "or DDP by --config_file accelerate_configs/ddp.yaml.",
        )
    for name in ("torch_compile", "fp16"):
        if training.get(name):
            problems.add(f"training.{name}", "is true, which is not tested with FSDP2. Remove it.")


def check_devices() -> None:
    """FSDP without a GPU only where it was asked for.

    Raises:
        UserError: there is none, and the environment variable that allows it is not set.
    """
    if is_fsdp() and not torch.cuda.is_available() and os.environ.get(ON_CPU) != "1":
        raise UserError(
            "The launcher asks for FSDP but there is no CUDA GPU. Train without it, or try FSDP2 on the CPU: "
            f"{ON_CPU}=1 accelerate launch --config_file accelerate_configs/fsdp2.yaml ..."
        )


def configure_cpu(timeout: timedelta) -> None:
    """Make the process group for FSDP2 without a GPU, which accelerate would silently turn into DDP.

    It says of the process group, which is gloo's, what it says of several GPUs (accelerate/state.py). For trying out
    and for tests: that is a private attribute of accelerate.

    Args:
        timeout: of the process group.
    """
    from accelerate import PartialState
    from accelerate.state import DistributedType

    PartialState(cpu=True, timeout=timeout)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


@contextlib.contextmanager
def matrices_on_meta() -> Iterator[None]:
    """Modules made here have their matrices on the meta device: shape and type, no memory.

    One-dimensional parameters, which are small and keep the values that their class gives them, stay real.
    """
    register = torch.nn.Module.register_parameter

    def register_on_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and parameter.dim() >= 2 and parameter.device.type != "meta":
            parameter = torch.nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


def shard(trainer: ClmTrainer) -> None:
    """Divide the trainer's model, whose matrices are on the meta device, and fill the shards with its first weights.

    accelerate would divide it later, from a whole model on each rank; what is divided already it leaves alone.
    """
    from accelerate.utils import fsdp2_prepare_model
    from torch.distributed.fsdp import MixedPrecisionPolicy

    accelerator, model, device = trainer.accelerator, trainer.model, trainer.args.device
    # of two collectives where a mesh has two dimensions: said once by each process, of the norm of the gradients
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    kept = {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()] if not t.is_meta}
    if tp_size() > 1:
        divide(model, accelerator.torch_device_mesh["tp"])
        # accelerate 1.12 to 1.15 ask transformers for a class that version 5 has no longer, to do what is done already
        accelerator._prepare_tp = lambda *args: args
    if is_fsdp():
        if trainer.plan.precision == "bf16":
            # accelerate's own policy would add gradients up in bf16
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            accelerator.state.fsdp_plugin.mixed_precision_policy = policy
        warnings.filterwarnings("ignore", message="Slicing a flattened dim")  # accelerate's way to make HSDP's mesh
        fsdp2_prepare_model(accelerator, model)
        if getattr(accelerator.state.fsdp_plugin.cpu_offload, "pin_memory", None) is not None:
            device = "cpu"
    model.to_empty(device=device)
    buffers = dict(model.named_buffers())
    with torch.no_grad(), freed_memory_goes_back():
        for name, buffer in buffers.items():
            buffer.copy_(kept[name])
        source: Source = model.first_weights
        for name, parameter in model.named_parameters():
            fill(parameter, kept[name] if name in kept else source(name, parameter.shape))
    del model.first_weights


def fill(parameter: torch.Tensor, full: torch.Tensor) -> None:
    """Copy this rank's part of a full tensor into a sharded one (or all of it into one that is whole)."""
    local_of(parameter).copy_(local_part(full, parameter))


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def local_part(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's part of `full`, cut as `like` is."""
    if not hasattr(like, "device_mesh"):
        return full
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    for dimension, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
        full = full.narrow(dimension, offset if size else 0, size)
    return full


def is_own_shard(value: Any) -> bool:
    """Whether a DTensor's part is this rank's to write: of several that hold it, as with HSDP, the first one's."""
    place = value.device_mesh.get_coordinate()
    return all(at == 0 for at, how in zip(place, value.placements, strict=True) if how.is_replicate())


def reshard(model: torch.nn.Module) -> None:
    """Let each rank hold its shards only: after a forward without a backward some modules still have their weights
    whole, as other parameters than those that the optimizer knows."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather_state(model: PreTrainedModel, is_writer: bool) -> dict[str, torch.Tensor]:
    """All weights, whole, on the CPU of the writer; {} elsewhere. A collective, one parameter at a time."""
    reshard(model)
    gathered: dict[int, torch.Tensor] = {}
    state = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in gathered:  # tied weights appear under each of their names
            whole = value.detach()
            whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
            gathered[id(value)] = whole.to("cpu", copy=True) if is_writer else whole.new_empty(0)
        if is_writer:
            state[name] = gathered[id(value)]
    return state
