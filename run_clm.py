"""Train a causal language model from a recipe: the story of a run, top to bottom.

    accelerate launch run_clm.py recipes/llama_170m.yaml [section.key=value ...] [--dry-run]

In: a recipe and prepared data. Out: runs/<name>/ with checkpoints, metrics and final/ in Hub format.
The same command continues an interrupted run, and says so when the run is finished.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING

from clm.recipe import load_recipe
from clm.run_record import is_finished
from data_prep.errors import UserError

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from clm.plan import Plan


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
    return parser.parse_intermixed_args(argv)  # options and overrides in any order


def main(argv: list[str] | None = None) -> None:
    """Run one recipe to its end.

    Raises:
        UserError: anything a user can mend; `cli` shows it without a traceback.
    """
    # 1. The recipe. A finished run is recognised before anything heavy is imported.
    arguments = parse_arguments(argv)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if not arguments.dry_run and not recipe.problems.messages and is_finished(recipe):
        from data_prep.paths import runs_dir

        if os.environ.get("RANK", "0") == "0":
            print(f"{runs_dir() / recipe.name} is finished: {runs_dir() / recipe.name / 'final'}")
        return

    # 2. The launch: as many processes as were asked for, each on its device.
    from clm.launch import check_launch, hold_run, make_arguments

    num_processes = check_launch()

    # 3. The plan: data, batch, steps, schedule, disk; every problem of the recipe is told at once.
    from clm.plan import describe_plan, make_plan

    plan = make_plan(recipe, num_processes, arguments.dry_run)
    if arguments.dry_run:
        if os.environ.get("RANK", "0") == "0":
            print(describe_plan(plan))
        return

    # 4. The run folder: it must be this recipe's, on this data, and no other process may be writing there.
    from clm.run_record import check_same_data

    check_same_data(plan)
    args = make_arguments(plan)
    with hold_run(plan.run_folder) if args.process_index == 0 else nullcontext():
        train(plan, args)


def train(plan: Plan, args: TrainingArguments) -> None:
    """The second half: from the newest checkpoint, or from the beginning, to final/."""
    from clm.launch import pick_checkpoint, prepare_loggers
    from clm.metrics import cut_back, log, setup_logging
    from clm.plan import describe_plan
    from clm.run_record import write_record

    is_main = args.process_index == 0
    run = plan.run_folder
    setup_logging(run if is_main else None, is_main)
    log.info("%s", describe_plan(plan))

    # 5. The checkpoint to continue from, chosen by rank 0 for all.
    checkpoint, facts = pick_checkpoint(plan)
    if is_main:
        write_record(plan)
        for name in ("metrics.jsonl", "samples.jsonl"):
            cut_back(run / name, facts.get("step", -1))
    prepare_loggers(plan, args)

    # 6. The model and its first weights.
    from clm.model import build_model

    model = build_model(plan.recipe.model, plan.config, plan.tokenizer, plan.attention, plan.seed)

    # 7. The training.
    from clm.trainer import ClmTrainer

    args.eval_on_start = bool(plan.validation) and checkpoint is None
    trainer = ClmTrainer(plan, model, args, facts.get("pending_loss"))
    trainer.progress.seconds_before = facts.get("time_s", 0.0)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    # 8. The model in Hub format, its card, and the push if the recipe asks for one.
    final = trainer.save_final()
    if is_main:
        record = {"step": plan.num_steps, "tokens": trainer.num_tokens, "finished": True}
        trainer.metrics_file.write({**record, "time_s": trainer.progress.seconds})
        log.info("final model: %s   curve: %s", final, run / "curve.svg")
    trainer.push_final(final)


def cli() -> None:
    """Entry point: a user's error is one message and exit code 2; under a launcher only one rank prints it."""
    try:
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(3)  # where rank 0 fails too, the launcher ends this process before it repeats the message
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)  # not sys.exit: a process group with a dead peer would wait for its timeout


if __name__ == "__main__":
    cli()
