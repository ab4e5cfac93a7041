"""From the launcher's environment to Trainer's arguments: processes, devices, precision, loggers, resume.

In: the environment (accelerate launch, torchrun or plain python) and a plan. Out: TrainingArguments, and the checkpoint
to continue from. Launchers that quietly start fewer processes than were asked for are caught here.
"""

from __future__ import annotations

import functools
import os
import time
import uuid
import warnings
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

from clm.arguments import DEFAULTS, build_arguments, scheduler_kwargs
from clm.checkpoint import clean_run_folder, find_damage, read_checkpoint_facts, rolled_back_at, total_bytes
from clm.divided import is_deepspeed_launch, is_divided
from clm.fsdp import configure_cpu
from clm.loading import check_layout
from clm.metrics import log
from clm.order import ORDER_VERSION
from clm.plan import Plan
from clm.run_folder import MANIFEST, PREFIX, list_checkpoints, list_weights
from clm.schedule import num_warmup_steps
from clm.timeline import Stage
from data_prep.errors import UserError
from data_prep.lock import folder_lock
from data_prep.sizes import format_bytes

DEFAULT_TIMEOUT_S = 1800  # TrainingArguments' own


def check_launch() -> int:
    """The number of processes of this launch.

    Raises:
        UserError: `accelerate launch --cpu --num_processes N` started one process instead of N.
    """
    # Tokenizers are used before and after DataLoader workers fork; their thread pool would warn or deadlock.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # accelerate's simple launcher sets a rendezvous address when more than one process was asked for, then starts one
    # (accelerate/utils/launch.py, prepare_simple_launcher_cmd_env).
    is_simple_launch = "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ
    if is_simple_launch and "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        raise UserError(
            "accelerate launch was asked for several processes but started one: on a CPU it does not start more. "
            "Use torchrun --nproc_per_node 2 run_clm.py <recipe>, or drop --num_processes."
        )
    return int(os.environ.get("WORLD_SIZE", "1"))


def make_arguments(plan: Plan, stage: Stage) -> Any:
    """TrainingArguments of this process for one stage, with everything that the plan derives.

    Raises:
        UserError: transformers refuses the values, or fewer processes came up than the launcher announced.
    """
    import torch
    import transformers

    if "log_level" not in plan.training:
        transformers.logging.set_verbosity_error()  # what a user must know is said by this project, once
    transformers.logging.disable_progress_bar()  # one bar: the run's
    # DeepSpeed calls functions that torch has renamed, several times a step
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    derived: dict[str, Any] = {
        "output_dir": str(plan.run_folder),
        "run_name": plan.recipe.name,
        "max_steps": plan.num_steps,
        # Trainer's samples are prepared blocks
        "per_device_train_batch_size": plan.samples_per_micro_batch,
        "gradient_accumulation_steps": plan.accumulation(stage),
        "bf16": plan.precision == "bf16",
        "fp16": plan.precision == "fp16",
        "torch_compile": plan.speed.compiled,
        "lr_scheduler_kwargs": scheduler_kwargs(plan.training, plan.num_steps),
        "ignore_data_skip": True,  # the sampler starts at the right sample by itself
        "remove_unused_columns": False,
        "disable_tqdm": True,  # clm.metrics.Progress is the bar
        "eval_strategy": plan.training.get("eval_strategy", DEFAULTS["eval_strategy"]) if plan.validation else "no",
    }
    if str(plan.training.get("optim", "")).startswith("schedule_free"):  # counts steps, and takes a share for a number
        derived["warmup_steps"] = num_warmup_steps(plan.training, plan.num_steps)
    if not torch.cuda.is_available():
        derived["dataloader_pin_memory"] = False  # there is nothing to copy to
        if is_deepspeed_launch():
            # DeepSpeed would ask for NCCL; on a CPU its process group must be there before TrainingArguments
            from accelerate import PartialState

            PartialState(backend="gloo")
            derived["accelerator_config"] = {
                **plan.training.get("accelerator_config", {}),
                "use_configured_state": True,
            }
        elif is_divided():
            configure_cpu(_timeout(plan))
            derived["use_cpu"] = True
            derived["accelerator_config"] = {
                **plan.training.get("accelerator_config", {}),
                "use_configured_state": True,
            }
        elif plan.num_processes > 1:
            from accelerate import PartialState

            PartialState(cpu=True, timeout=_timeout(plan))  # transformers' own way gives a CPU's group no timeout
            derived["use_cpu"] = True  # otherwise each process is a run of its own, of world size 1
            derived["accelerator_config"] = {
                **plan.training.get("accelerator_config", {}),
                "use_configured_state": True,
            }
            _let_torch_load_to_indexed_cpu()
    try:
        args = build_arguments(plan.training, derived)
    except (ValueError, ImportError) as error:
        raise UserError(f"{plan.recipe.path}: training: {error}") from None
    if args.world_size != plan.num_processes:
        raise UserError(
            f"{plan.num_processes} processes were launched but {args.world_size} take part in this run. It would not "
            "be the run that was asked for. On a machine without GPUs use torchrun --nproc_per_node N run_clm.py "
            "<recipe>."
        )
    if args.n_gpu > 1:
        args._n_gpu = 1  # Trainer would use DataParallel, which is slower than one GPU used well
        log.warning(
            "%s GPUs are visible, one is used: start with accelerate launch to use all.", torch.cuda.device_count()
        )
    return args


def _timeout(plan: Plan) -> timedelta:
    return timedelta(seconds=plan.training.get("ddp_timeout", DEFAULT_TIMEOUT_S))


@functools.cache
def _let_torch_load_to_indexed_cpu() -> None:
    """Older transformers (5.17) load an optimizer to the device "cpu:0", a name that torch's loader does not know."""
    import torch

    def restore(storage: Any, location: str) -> Any:
        return storage if location.startswith("cpu:") else None

    torch.serialization.register_package(priority=101, tagger=lambda _: None, deserializer=restore)  # 101: a free one


def hold_run(run: Path) -> AbstractContextManager[None]:
    """One training per run folder: a second one, or one whose launcher was killed and that lives on, is refused.

    Raises:
        UserError: names the process that trains there.
    """
    return folder_lock(run, "is training it", "training.run_name=... or RUNS_DIR")


def forget_accelerator() -> None:
    """Let the next Trainer of this process make its Accelerator as the first one did; the process group stays.

    accelerate keeps the first one's state for all later ones: gradient accumulation, and DeepSpeed's plugin, beside
    which it refuses another.
    """
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state()
    GradientState._reset_state()


def pick_checkpoint(plan: Plan) -> tuple[Path | None, dict[str, Any]]:
    """The newest checkpoint that every process holds undamaged, and its facts (step, tokens ...); (None, {}) for none.

    Sizes are compared by every process, SHA-256 by one of each node; rank 0's log says what was skipped and why.

    Raises:
        UserError: there are checkpoints but none can be used, or they were made by another version of the order.
    """
    from accelerate.utils import gather_object

    run, started_at = plan.run_folder, time.perf_counter()
    is_first_of_node = os.environ.get("LOCAL_RANK", "0") == "0"
    gather_object([0])  # nobody is writing any more
    if is_first_of_node:
        clean_run_folder(run)
    held = gather_object([[step for step, _ in list_checkpoints(run)]])
    skipped, is_any_damaged = [], False
    for step in sorted({step for steps in held for step in steps}, reverse=True):
        checkpoint = run / f"{PREFIX}{step}"
        answers = gather_object([_examine(run, checkpoint, is_first_of_node)])
        problem = next((answer for answer in answers if "problem" in answer), None)
        if problem is None and any(answer["facts"] != answers[0]["facts"] for answer in answers):
            problem = {"problem": "it is not the same one on all nodes", "is_damaged": True}
        if problem is None:
            break
        skipped.append(f"{checkpoint}: {problem['problem']}. It is skipped.")
        is_any_damaged |= problem["is_damaged"]
    else:
        _refuse_if_lost(run, skipped if is_any_damaged else [])
        for sentence in skipped:
            log.warning("%s", sentence)
        return None, {}
    for sentence in skipped:
        log.warning("%s", sentence)
    facts = read_checkpoint_facts(checkpoint)
    if facts["order_version"] != ORDER_VERSION:
        raise UserError(
            f"{checkpoint}: was made with version {facts['order_version']} of the data order, this code has "
            f"{ORDER_VERSION}. It would see other data. Check out the code it was made with."
        )
    check_layout(checkpoint, facts, plan)
    for newer in [path for step, path in list_weights(run) if step > facts["step"]]:
        log.warning("%s: holds weights only, so the run continues from before it.", newer)
    log.info(
        "continuing from %s (step %s, %s tokens; checked %s in %.2f s)",
        checkpoint,
        f"{facts['step']:,}",
        f"{facts['tokens']:,}",
        format_bytes(total_bytes(facts["files"])),
        time.perf_counter() - started_at,
    )
    return checkpoint, facts


def _examine(run: Path, checkpoint: Path, with_checksums: bool) -> dict[str, Any]:
    """Why this process cannot use a checkpoint, or the facts by which two nodes see that theirs is the same one."""
    if not (checkpoint / MANIFEST).is_file():
        return {"problem": f"process {os.environ.get('RANK', '0')} does not have it complete", "is_damaged": True}
    damage = find_damage(checkpoint, with_checksums)
    if damage is not None:
        return {"problem": damage, "is_damaged": True}
    facts = read_checkpoint_facts(checkpoint)
    bad_step = rolled_back_at(run, facts)
    if bad_step is not None:
        return {"problem": f"it has trained on step {bad_step}, which was rolled back", "is_damaged": False}
    return {"facts": [facts["step"], facts["tokens"], facts["pending_loss"], facts.get("excluded")]}


def _refuse_if_lost(run: Path, damaged: list[str]) -> None:
    """Starting from the beginning would overwrite a run of which something is left."""
    if damaged:
        raise UserError(
            "\n".join(damaged) + f"\n{run}: no checkpoint is undamaged. Restore one from a copy, or start again with "
            "another training.run_name, or delete the damaged ones."
        )
    weights = list_weights(run)
    if weights:
        raise UserError(
            f"{run}: cannot be resumed: {weights[-1][1].name} holds weights only. What is missing is the optimizer's "
            "state, the position in the schedule and the random states, which were deleted as run.retention says. "
            "Start a new run from the weights: remove model.config, and set "
            f"model.init={weights[-1][1]} training.run_name={run.name}-2."
        )


def agree(plan: Plan, value: Any) -> Any:
    """Rank 0's value, on all ranks."""
    if plan.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    box = [value]
    broadcast_object_list(box)
    return box[0]


def prepare_loggers(plan: Plan, args: Any) -> None:
    """One curve per run in TensorBoard and W&B, also over resumes: both get their place from the run folder."""
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(plan.run_folder / "tensorboard"))
    if "wandb" in args.report_to and args.process_index == 0:
        file = plan.run_folder / "wandb_run_id"
        if not file.is_file():
            file.write_text(uuid.uuid4().hex[:16])
        os.environ.setdefault("WANDB_RUN_ID", file.read_text().strip())
        os.environ.setdefault("WANDB_RESUME", "allow")
        os.environ.setdefault("WANDB_DIR", str(plan.run_folder))
        os.environ.setdefault("WANDB_PROJECT", "clm")
