"""`python -m clm check RECIPE [section.key=value ...]`: what `make train` asks before it launches anything.

Launchers turn a child's exit code and message into their own; here a mistake is one message and exit code 2.
"""

from __future__ import annotations

import argparse

from clm.recipe import load_recipe
from clm.run_record import check_same_data, is_finished


def main(argv: list[str]) -> int:
    """Check recipe, data, model and run folder; returns the exit code 0.

    Raises:
        UserError: everything that is wrong, at once.
    """
    parser = argparse.ArgumentParser(
        prog="python -m clm check",
        description="Check a recipe, its data and its run folder without training.",
        epilog="example: python -m clm check recipes/llama_170m.yaml training.learning_rate=3e-4",
    )
    parser.add_argument("recipe", help="a YAML file, e.g. recipes/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as for run_clm.py")
    arguments = parser.parse_intermixed_args(argv)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if not recipe.problems.messages and is_finished(recipe):
        print(f"{arguments.recipe}: this run is finished")
        return 0
    from clm.plan import make_plan

    # one process: what it cannot divide, no number of processes can; the launch checks its own number
    plan = make_plan(recipe, num_processes=1)
    check_same_data(plan)
    print(f"{arguments.recipe}: recipe, data and model fit together; {plan.num_steps:,} steps into {plan.run_folder}")
    return 0
