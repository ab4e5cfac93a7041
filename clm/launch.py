"""From the launcher's environment to Trainer's arguments: processes, devices, precision, loggers, resume.

In: the environment (accelerate launch, torchrun or plain python) and a plan. Out: TrainingArguments, and the checkpoint
to continue from. Launchers that quietly start fewer processes than were asked for are caught here.
"""

from __future__ import annotations

import os
import uuid
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from clm.arguments import DEFAULTS, build_arguments, scheduler_kwargs
from clm.checkpoint import clean_run_folder, newest_good_checkpoint, read_checkpoint_facts
from clm.metrics import log
from clm.order import ORDER_VERSION
from clm.plan import Plan
from data_prep.errors import UserError
from data_prep.lock import folder_lock


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


def make_arguments(plan: Plan) -> Any:
    """TrainingArguments of this process, with everything that the plan derives.

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
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "bf16": plan.precision == "bf16",
        "fp16": plan.precision == "fp16",
        "lr_scheduler_kwargs": scheduler_kwargs(plan.training, plan.num_steps),
        "ignore_data_skip": True,  # the sampler starts at the right sample by itself
        "remove_unused_columns": False,
        "disable_tqdm": True,  # clm.metrics.Progress is the bar
        "eval_strategy": plan.training.get("eval_strategy", DEFAULTS["eval_strategy"]) if plan.validation else "no",
    }
    if not torch.cuda.is_available():
        derived["dataloader_pin_memory"] = False  # there is nothing to copy to
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            # DeepSpeed would ask for NCCL; on a CPU its process group must be there before TrainingArguments
            from accelerate import PartialState

            PartialState(backend="gloo")
            derived["accelerator_config"] = {
                **plan.training.get("accelerator_config", {}),
                "use_configured_state": True,
            }
        elif plan.num_processes > 1:
            derived["use_cpu"] = True  # otherwise each process is a run of its own, of world size 1
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


def hold_run(run: Path) -> AbstractContextManager[None]:
    """One training per run folder: a second one, or one whose launcher was killed and that lives on, is refused.

    Raises:
        UserError: names the process that trains there.
    """
    return folder_lock(run, "is training it", "training.run_name=... or RUNS_DIR")


def pick_checkpoint(plan: Plan) -> tuple[Path | None, dict[str, Any]]:
    """The newest undamaged checkpoint and its facts (step, tokens, time_s), the same on all ranks; (None, {}) for none.

    Raises:
        UserError: all checkpoints are damaged, or they were made by another version of the order.
    """
    choice: list[Any] = [None]
    if int(os.environ.get("RANK", "0")) == 0:
        clean_run_folder(plan.run_folder)
        try:
            checkpoint, skipped = newest_good_checkpoint(plan.run_folder)
            choice = [(checkpoint, skipped)]
        except UserError as error:
            choice = [error]
    if plan.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(choice)
    if isinstance(choice[0], UserError):
        raise choice[0]
    checkpoint, skipped = choice[0]
    for sentence in skipped:
        log.warning("%s", sentence)
    if checkpoint is None:
        return None, {}
    facts = read_checkpoint_facts(checkpoint)
    if facts["order_version"] != ORDER_VERSION:
        raise UserError(
            f"{checkpoint}: was made with version {facts['order_version']} of the data order, this code has "
            f"{ORDER_VERSION}. It would see other data. Check out the code it was made with."
        )
    log.info("continuing from %s (step %s, %s tokens)", checkpoint, f"{facts['step']:,}", f"{facts['tokens']:,}")
    return checkpoint, facts


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
