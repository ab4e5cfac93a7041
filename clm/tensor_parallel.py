"""Tensor parallelism: the matrices of each layer divided among the processes of a group, which all see the same rows.

In: a model whose matrices are on the meta device, and the group's mesh. Out: the same model with every parameter a
DTensor, not filled yet (clm/fsdp.py does that), and hooks around its modules; in between are plain tensors.

    q, k, v, gate, up      by their rows: each process has some of the heads and some of the hidden units
    o, down                by their columns: what the processes compute is added up
    embedding, norms, head whole on each process, as a DTensor too: one kind of parameter for optimizer and checkpoint

Which matrix is divided how says transformers' plan for the model (`base_model_tp_plan`); the dividing is torch's
parallelize_module. transformers' own loading with a plan is not used: Trainer cannot save an optimizer after it.
The head stays whole since the loss needs whole rows of logits: chunk by chunk, within FSDP2 all at once.
"""

from __future__ import annotations

import os
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from clm.divided import is_deepspeed_used, is_fsdp, tp_size

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PretrainedConfig, PreTrainedModel

    from clm.recipe import Recipe

# Types whose losses, gradients and weights were compared with those of one process. None has dropout but in attention,
# where the masks are those of a process's own heads.
MODEL_TYPES = ("gemma", "llama", "mistral", "qwen2", "qwen3", "smollm3")
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
# what transformers calls the norms of queries and keys: whole, but each process applies them to its heads
OF_HEADS = "replicated_with_grad_allreduce"
BESIDE_FSDP = "accelerate_configs/tp_fsdp2.yaml"


def check_tensor_parallel(
    recipe: Recipe, training: dict[str, Any], config: PretrainedConfig | None, num_processes: int
) -> None:
    """Refuse what does not work with tensor parallelism; problems go to recipe.problems.

    Args:
        config: None in a dry run whose base model is not here.
    """
    from clm.arguments import DEFAULTS

    size, problems = tp_size(), recipe.problems
    if size == 1:
        return
    say = problems.messages.append
    asked = f"{recipe.path}: the launcher asks for tensor parallelism (tp_size {size})"
    copies, parts = (int(os.environ.get(f"PARALLELISM_CONFIG_DP_{name}_SIZE", "1")) for name in ("REPLICATE", "SHARD"))
    if is_deepspeed_used(training):
        say(f"{asked} beside DeepSpeed, which divides the model itself. Use {BESIDE_FSDP}, or set tp_size to 1.")
    elif copies > 1:
        say(
            f"{asked} beside copies of the model (dp_replicate_size {copies}), which is not tested. Set that to 1 and "
            f"use dp_shard_size, as in {BESIDE_FSDP}."
        )
    elif not is_fsdp() and size != num_processes:
        say(
            f"{asked} but there are {num_processes} processes. Start {size}, or say --parallelism_config_tp_size "
            f"{num_processes}; groups beside each other need FSDP2: {BESIDE_FSDP}."
        )
    elif is_fsdp() and (size * parts != num_processes or parts == 1):
        say(
            f"{asked} within FSDP2 among {parts} (dp_shard_size), but there are {num_processes} processes. Their "
            f"product must be the number of processes, and dp_shard_size above 1: see {BESIDE_FSDP}."
        )
    if is_fsdp() and os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        say(f"{asked} and for fsdp_offload_params, which is not tested with it. Set that to false.")
    if config is not None:
        _check_shape(recipe, config, size)
    optim = training.get("optim", DEFAULTS["optim"])
    if optim not in OPTIMIZERS:
        problems.add(
            "training.optim",
            f"is {optim}, whose state under tensor parallelism is not that of the whole parameter. Use "
            f"{' or '.join(OPTIMIZERS)}, or another launcher.",
        )
    if recipe.run.optimizer == "muon":
        problems.add("run.optimizer", "is muon, which is not tested with tensor parallelism. Use FSDP2 or DDP.")
    for name in ("torch_compile", "fp16"):
        if training.get(name):
            problems.add(f"training.{name}", "is true, which is not tested with tensor parallelism. Remove it.")


def _check_shape(recipe: Recipe, config: PretrainedConfig, size: int) -> None:
    key = "model.config" if recipe.model.init == "random" else "model.init"
    source = recipe.model.config if recipe.model.init == "random" else recipe.model.init
    kind = config.model_type
    if kind not in MODEL_TYPES:
        recipe.problems.add(
            key,
            f"is {source}, a {kind} model, but tensor parallelism is tested with {', '.join(MODEL_TYPES)}. Use "
            "another launcher, for example accelerate_configs/fsdp2.yaml.",
        )
        return
    for name in ("num_key_value_heads", "num_attention_heads", "intermediate_size"):
        value = getattr(config, name)
        if value % size:
            recipe.problems.add(
                key,
                f"is {source} with {name} {value}, which tp_size {size} does not divide. Set "
                "parallelism_config_tp_size to a divisor, and start as many processes; or use "
                "accelerate_configs/fsdp2.yaml.",
            )
            return


def divide(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Make every parameter a DTensor on the mesh and every module with parameters one that takes and gives plain
    tensors.

    Args:
        mesh: of the group, one dimension.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model._tp_size = mesh.size()  # what accelerate asks for before it takes the model
    styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    prefix = f"{model.base_model_prefix}."
    plan: dict[str, Any] = {}
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            kind = _kind_of(model.config.base_model_tp_plan, name.removeprefix(prefix))
            # (B, T, heads, D): the heads of this process
            plan[name] = styles[kind]() if kind in styles else _whole(Shard(2) if kind == OF_HEADS else Replicate())
    parallelize_module(model, mesh, plan)
    model.tie_weights()
    for parent in {name.rpartition(".")[0] for name, style in plan.items() if isinstance(style, ColwiseParallel)}:
        model.get_submodule(parent).register_forward_pre_hook(_enter_once(mesh), with_kwargs=True)


def _kind_of(plan: dict[str, str], name: str) -> str | None:
    return next((kind for pattern, kind in plan.items() if fnmatch(name, pattern)), None)


def _whole(layout: Any) -> Any:
    """The parameters whole on each process, the input divided by `layout`, and the output as the input."""
    from torch.distributed.tensor import DTensor, distribute_module
    from torch.distributed.tensor.parallel import ParallelStyle

    class Whole(ParallelStyle):
        def _apply(self, module: torch.nn.Module, mesh: DeviceMesh) -> torch.nn.Module:
            return distribute_module(module, mesh, None, enter, leave)

    def enter(module: torch.nn.Module, inputs: tuple, mesh: DeviceMesh) -> tuple:
        return tuple(DTensor.from_local(each, mesh, [layout], run_check=False) for each in inputs)

    def leave(module: torch.nn.Module, output: Any, mesh: DeviceMesh) -> torch.Tensor:
        return output.redistribute(placements=[layout]).to_local()

    return Whole()


def _enter_once(mesh: DeviceMesh) -> Any:
    """A hook that makes `hidden_states` a DTensor before several matrices take it: in backward their gradients by it
    are added up on each process first, and sent once."""
    from torch.distributed.tensor import DTensor, Replicate

    def enter(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        def dtensor(hidden: torch.Tensor) -> torch.Tensor:
            return DTensor.from_local(hidden, mesh, [Replicate()], run_check=False)

        if args:
            return (dtensor(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": dtensor(kwargs["hidden_states"])}

    return enter
