"""Train a causal language model from a recipe: the story of a run, top to bottom.

    accelerate launch run_clm.py recipes/llama_170m.yaml [section.key=value ...] [--dry-run]

In: a recipe and prepared data. Out: runs/<name>/ with checkpoints, metrics and final/ in Hub format.
The same command continues an interrupted run, and says so when the run is finished.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import os
import sys
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, NoReturn

from clm.recipe import load_recipe
from clm.run_record import is_finished
from data_prep.errors import UserError

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from clm.plan import Plan
    from clm.signals import Requests
    from clm.trainer import ClmTrainer


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line; everything else is in the recipe."""
    parser = argparse.ArgumentParser(
        prog="run_clm.py",
        description="Train a causal language model from a recipe. Typed again, it continues where the run stopped.",
        epilog="examples:\n"
        "  python run_clm.py recipes/demo.yaml\n"
        "  python run_clm.py recipes/llama_170m.yaml --dry-run\n"
        "  accelerate launch run_clm.py recipes/llama_170m.yaml training.learning_rate=3e-4 data.tokens=1B\n"
        "  torchrun --nproc_per_node 2 run_clm.py recipes/demo.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="a YAML file, e.g. recipes/demo.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="change a key of the recipe; the value is YAML"
    )
    parser.add_argument("--dry-run", action="store_true", help="resolve, check and print everything, train nothing")
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="go on with a run whose recipe or data has changed; the changes are written into its events.jsonl",
    )
    return parser.parse_intermixed_args(argv)  # options and overrides in any order


def main(argv: list[str] | None = None) -> None:
    """Run one recipe to its end.

    Raises:
        UserError: anything a user can mend; `cli` shows it without a traceback.
    """
    # 1. The recipe. A finished run is recognised before anything heavy is imported.
    arguments = parse_arguments(argv)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if not arguments.dry_run and not recipe.problems.messages and is_finished(recipe, arguments.allow_changes):
        from data_prep.paths import runs_dir

        if os.environ.get("RANK", "0") == "0":
            print(f"{runs_dir() / recipe.name} is finished: {runs_dir() / recipe.name / 'final'}")
        return

    # 2. The launch: as many processes as were asked for, each on its device.
    from clm.fsdp import check_devices
    from clm.launch import check_launch, hold_run, make_arguments
    from clm.roll_call import RollCall

    num_processes = check_launch()
    roll_call = RollCall()

    # 3. The plan: data, stages, batch, steps, schedule, disk; every problem of the recipe is told at once.
    from clm.plan import make_plan
    from clm.plan_text import describe_plan

    try:
        plan = make_plan(recipe, num_processes, arguments.dry_run)
        if not arguments.dry_run:
            check_devices()
    except UserError as error:
        if not arguments.dry_run:
            roll_call.report_failure(error)
        raise
    if arguments.dry_run:
        if os.environ.get("RANK", "0") == "0":
            print(describe_plan(plan))
        return
    roll_call.compare(plan)

    # 4. The run folder: it must be this recipe's, on this data, and no other process may be writing there.
    from clm.heartbeat import Heartbeat
    from clm.run_record import check_same_data
    from clm.signals import Requests

    check_same_data(plan, arguments.allow_changes)
    args = make_arguments(plan, plan.timeline.stages[0])
    holding = hold_run(plan.run_folder) if args.process_index == 0 else nullcontext()
    heartbeat = Heartbeat(plan.run_folder, args.process_index, num_processes, args.ddp_timeout)
    with holding, Requests(plan.run_folder, args.process_index) as requests, heartbeat:
        requests.heartbeat = heartbeat
        run(plan, args, requests)


def run(plan: Plan, args: TrainingArguments, requests: Requests) -> None:
    """The second half: stage by stage, each from the newest checkpoint, to final/."""
    from clm.launch import forget_accelerator, prepare_loggers
    from clm.metrics import log, setup_logging
    from clm.plan_text import describe_plan
    from clm.run_record import note_changes, write_record

    is_main = args.process_index == 0
    setup_logging(plan.run_folder if is_main else None, is_main)
    log.info("%s", describe_plan(plan))
    if is_main:
        for change in note_changes(plan):
            log.warning("allowed by --allow-changes: %s", change)
        write_record(plan)
    prepare_loggers(plan, args)

    # 5. The training. A stage border and a rollback are a resume like any other.
    trainer = train(plan, requests)
    while trainer.outcome in ("border", "rollback"):
        del trainer
        gc.collect()  # its model and optimizer, before the next ones exist
        forget_accelerator()
        trainer = train(plan, requests)
    if trainer.outcome == "stopped":
        requests.leave(trainer)

    # 6. The model in Hub format, its card, and the push if the recipe asks for one.
    final = trainer.save_final()
    if is_main:
        record = {"step": plan.num_steps, "tokens": trainer.num_tokens, "finished": True}
        trainer.metrics_file.write({**record, "time_s": trainer.progress.seconds})
        log.info("final model: %s   curve: %s", final, plan.run_folder / "curve.svg")
    trainer.push_final(final)


def train(plan: Plan, requests: Requests) -> ClmTrainer:
    """From the newest checkpoint, or from the beginning, to the end of its stage; `outcome` says why it ended."""
    from clm.divided import is_divided
    from clm.events import excluded_ranges
    from clm.launch import agree, make_arguments, pick_checkpoint
    from clm.metrics import cut_back_run
    from clm.model import build_planned_model
    from clm.same_weights import check_first_weights
    from clm.trainer import ClmTrainer

    # a. Where it goes on: what rollbacks took out, and the checkpoint, chosen for all ranks.
    plan = plan.excluding(agree(plan, excluded_ranges(plan.run_folder)))
    checkpoint, facts = pick_checkpoint(plan)
    step = facts.get("step", 0)
    stage = plan.timeline.stage_of_step(min(step + 1, plan.num_steps))
    cut_back_run(plan.run_folder, step if checkpoint else -1)

    # b. The stage's batch, and the model with its first weights; those of a checkpoint replace them.
    args = make_arguments(plan, stage)
    args.eval_on_start = bool(plan.validation) and checkpoint is None
    model = build_planned_model(plan, stage, is_divided())

    # c. The HF Trainer.
    trainer = ClmTrainer(plan, stage, model, args, facts.get("pending_loss"))
    trainer.progress.seconds_before = facts.get("time_s", 0.0)
    if checkpoint is None:
        check_first_weights(trainer)
    requests.follow(trainer)
    trainer.spikes.start(facts.get("spikes"))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


def cli() -> NoReturn:
    """Entry point: a user's error is one message and exit code 2; under a launcher only one rank prints it."""
    code = 0
    try:
        main()
    except SystemExit as stopped:  # on request, after saving; --help too
        code = stopped.code or 0
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(3)  # where rank 0 fails too, the launcher ends this process before it repeats the message
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)  # nor atexit: a process group with a dead peer would wait for its timeout
    end_process(code)


def end_process(code: int) -> NoReturn:
    """Do what Python does at exit (W&B ends its run there), but do not take the interpreter down.

    A thread of gloo that lets go of a tensor during Python's shutdown aborts the process ("terminate called without an
    active exception"), which the launcher reports as a failed run though final/ is there.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    cli()
