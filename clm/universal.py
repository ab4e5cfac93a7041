"""A checkpoint of DeepSpeed ZeRO, of which each process has written its part -> one that any number of processes reads.

In: runs/<name>/checkpoint-<step> with `global_step<step>/`. Out: the same checkpoint, which also holds

    global_step<step>_universal/zero/<parameter>/{fp32,exp_avg,exp_avg_sq}.pt    each parameter whole
    latest_universal                                                            the name of that folder

DeepSpeed's own converter (ds_to_universal) makes it and DeepSpeed's engine reads it, on any number of processes of the
same ZeRO stage; DDP, FSDP2 and one process read the parameters' files here.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clm.checkpoint import (
    SAVING,
    Files,
    clean_run_folder,
    explain_failure,
    find_damage,
    free_bytes,
    hash_files,
    publish,
    read_checkpoint_facts,
    total_bytes,
)
from clm.fsdp import fill
from clm.run_folder import find_run, list_checkpoints
from data_prep.errors import UserError
from data_prep.lock import folder_lock
from data_prep.sizes import format_bytes

if TYPE_CHECKING:
    from clm.trainer import ClmTrainer

LATEST = "latest_universal"  # DeepSpeed's name
_STATES = ("exp_avg", "exp_avg_sq")  # of Adam and AdamW, the only ones that ds_to_universal knows


def is_engines(files: Files) -> bool:
    """Whether DeepSpeed's engine wrote these files of a checkpoint."""
    return any(name.startswith("global_step") for name in files)


def is_universal(files: Files) -> bool:
    """Whether these files of a checkpoint can be read by any number of processes, though DeepSpeed wrote them."""
    return LATEST in files


def is_zero_3(files: Files) -> bool:
    """Whether they are those of ZeRO stage 3, which has a file of model states for each process."""
    return any("zero_pp_rank_0_mp_rank_00_model_states" in name for name in files)


def convert_command(checkpoint: Path) -> str:
    """What a user types to make a checkpoint universal."""
    return f"python -m clm convert {checkpoint}"


def convert_checkpoint(checkpoint: str) -> str:
    """Make a ZeRO checkpoint one that any number of processes can read; what it held stays in it.

    The whole is written beside it and takes its place by a rename. It needs room for three fp32 copies of the model,
    twice while it is made, and the memory of two processes' parts of the optimizer.

    Raises:
        UserError: it is no complete checkpoint of DeepSpeed, is damaged or in use, or there is no room.
    """
    source = Path(checkpoint)
    run = find_run(source.parent if str(source.parent) != "." else source)
    with folder_lock(run, "is training it", "training.run_name=... or RUNS_DIR"):
        clean_run_folder(run)  # of a conversion that was killed
        if source.name not in (names := [path.name for _, path in list_checkpoints(run)]):
            raise UserError(f"{source}: is no complete checkpoint. {run} has: {', '.join(names) or 'none'}.")
        facts = read_checkpoint_facts(source)
        files: Files = facts.pop("files")
        if not is_engines(files):
            raise UserError(f"{source}: was not written by DeepSpeed. Any number of processes reads it as it is.")
        if is_universal(files):
            return f"{source}: is converted already; any number of processes continues from it."
        damage = find_damage(source)
        if damage:
            raise UserError(f"{source}: {damage}. Take another checkpoint.")
        shards = {name: file for name, file in files.items() if name.endswith("_optim_states.pt")}
        need, room = 2 * total_bytes(shards), free_bytes(run)
        if room < need:
            raise UserError(
                f"{run}: the converted checkpoint takes {format_bytes(need)} in the making, but {format_bytes(room)} "
                "are free. Free space, and type the same command."
            )
        print(f"{source}: joins the parts of {facts['num_processes']} processes, {format_bytes(total_bytes(shards))}")
        temporary = run / SAVING / source.name
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            added = _write_universal(source, temporary, files)
            del facts["sha256"]
            publish(temporary, source, facts, dict(sorted({**files, **added}.items())))
        except BaseException as error:
            if source.exists():  # else the new one is whole, and the next start or call puts it in its place
                shutil.rmtree(temporary, ignore_errors=True)
                with contextlib.suppress(OSError):
                    temporary.parent.rmdir()
            if isinstance(error, Exception):
                raise explain_failure(error, source, need) from error
            raise
    return (
        f"{source}: {format_bytes(total_bytes(added))} added. DeepSpeed of the same ZeRO stage continues from it with "
        "any number of processes, and so do DDP, FSDP2 and one process: type the training's command with another "
        "number or launcher."
    )


def _write_universal(source: Path, folder: Path, files: Files) -> Files:
    """Write the whole checkpoint anew, what was there as hard links; returns the files that are new."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _link(source / name, folder / name)
    (parts,) = folder.glob("global_step*")
    whole = parts.with_name(f"{parts.name}_universal")
    run_converter(parts, whole)
    for path in whole.glob("*_model_states.pt"):  # copies: only what they say of the training is read of them
        path.unlink()
        _link(parts / path.name, path)
    _shorten(whole / "zero" / "optimizer_state.pt")
    new = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    return hash_files(folder, sorted(set(new) - set(files)))


def run_converter(parts: Path, whole: Path) -> None:
    """DeepSpeed's ds_to_universal, as its command line calls it, without its output.

    Raises:
        UserError: DeepSpeed is not installed, or the optimizer is not AdamW.
    """
    try:
        from deepspeed.checkpoint import ds_to_universal
    except ImportError as error:
        raise UserError(
            f"{parts}: DeepSpeed converts it, which cannot be imported here ({error}). Install the extra deepspeed: "
            "pip install -c constraints.txt -e '.[deepspeed]'."
        ) from None
    how = Namespace(
        input_folder=str(parts),
        output_folder=str(whole),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # the patterns of tensor-parallel parameters, of which there are none
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            ds_to_universal.main(how)
        except KeyError as error:
            if error.args[0] not in _STATES:
                raise
            raise UserError(f"{parts}: its optimizer is not AdamW; DeepSpeed converts no other.") from None


def _shorten(path: Path) -> None:
    """Of ZeRO stage 3 the converter leaves process 0's part of the optimizer in what all read for its settings."""
    content = torch.load(path, map_location="cpu", weights_only=False)
    if "fp32_flat_groups" in content:
        content["fp32_flat_groups"] = []
        state = content["optimizer_state_dict"]["state"]
        content["optimizer_state_dict"]["state"] = {0: {"step": state[0]["step"]}}
        torch.save(content, path)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def prepare_engine(trainer: ClmTrainer, checkpoint: Path) -> None:
    """Let DeepSpeed's engine read the universal form where the number of processes is another.

    Raises:
        UserError: the checkpoint is of a ZeRO stage that this launch's cannot read.
    """
    if not trainer.is_deepspeed_enabled:
        return
    facts, stage = read_checkpoint_facts(checkpoint), trainer.accelerator.deepspeed_plugin.zero_stage
    if is_zero_3(facts["files"]) != (stage == 3):
        wrote = "stage 3" if is_zero_3(facts["files"]) else "stage 1 or 2"
        raise UserError(
            f"{checkpoint}: was written by ZeRO {wrote}, which ZeRO stage {stage} cannot read. Start it with that "
            f"stage. DDP, FSDP2 and one process go on from it, too, after: {convert_command(checkpoint)}"
        )
    config = trainer.accelerator.deepspeed_plugin.deepspeed_config
    is_other = facts["num_processes"] != trainer.args.world_size
    config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": is_other}


def mend_optimizer(trainer: ClmTrainer, checkpoint: Path) -> None:
    """Mend what ZeRO stage 3 makes of the optimizer when it reads a universal checkpoint (deepspeed 0.19,
    runtime/zero/stage3.py, load_hp_checkpoint_state_from_checkpoint_dir_stage3).

    It gives all groups of parameters the settings of the first, and so weight decay to those that have none; and all
    of them one and the same counter of steps, which each then counts up.
    """
    config = trainer.accelerator.deepspeed_plugin.deepspeed_config
    if not config.get("checkpoint", {}).get("load_universal"):
        return
    optimizer = trainer.optimizer
    saved = _load(_zero_folder(checkpoint) / "optimizer_state.pt")["param_groups"]
    for group, about in zip(optimizer.param_groups, saved, strict=True):
        group.update({name: value for name, value in about.items() if name != "params"})
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def load_weights(checkpoint: Path, model: torch.nn.Module) -> None:
    """The model's fp32 weights, whether the model is divided by FSDP2 or not."""
    zero = _zero_folder(checkpoint)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fill(parameter, _read(zero / name / "fp32.pt", parameter))


def load_optimizer(checkpoint: Path, model: torch.nn.Module, optimizer: Any) -> None:
    """The state of a fresh AdamW, whether the model is divided by FSDP2 or not; its settings are the recipe's."""
    optimizer, zero = getattr(optimizer, "optimizer", optimizer), _zero_folder(checkpoint)
    names = {parameter: name for name, parameter in model.named_parameters()}
    about = _load(zero / "optimizer_state.pt")
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            folder = zero / names[parameter]
            if (folder / "step.pt").is_file():
                step = _load(folder / "step.pt")
            else:
                step = about["optimizer_state_dict"]["state"][0]["step"]
            device = parameter.device if optimizer.defaults.get("fused") else "cpu"
            state = optimizer.state.setdefault(parameter, {})
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)
            for key in _STATES:
                state[key] = torch.empty_like(parameter, requires_grad=False)
                fill(state[key], _read(folder / f"{key}.pt", parameter))


def _zero_folder(checkpoint: Path) -> Path:
    return checkpoint / (checkpoint / LATEST).read_text(encoding="utf-8").strip() / "zero"


def _read(path: Path, like: torch.Tensor) -> torch.Tensor:
    """One whole tensor, of the shape of a parameter."""
    content = _load(path)
    return (content["param"] if isinstance(content, dict) else content).view(like.shape)


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)  # its SHA-256 was compared before
