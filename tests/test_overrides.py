"""What of transformers' Trainer is overridden or done again here, and whether it is still what it was.

Each entry names the stock source by a hash (of its code lines: comments and docstring do not count), for the oldest and
the newest supported version; what lies between them may have either. When upstream changes one, the test says which,
what of ours stands in its place, and what to compare; then the hash is added. `test` is where ours is compared.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import pkgutil
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from tiny import make_model
from transformers import Trainer

from clm.fast_steps import FastSteps
from clm.trainer import ClmTrainer

ROOT = Path(__file__).resolve().parent.parent
OLDEST, NEWEST = "5.17.0", "5.23.0"


class Stock(NamedTuple):
    """One piece of stock. `hashes`: of the oldest version's source, and of the newest where that is another."""

    hashes: tuple[str, ...]
    compare: str  # what has to be looked at when it changes
    test: str  # file::function


OVERRIDDEN = {
    "train": Stock(
        ("b083adc5a26d", "12af1a3d2e4b"),
        "what is done in its `finally`, and that it still ends when training ends",
        "tests/end_to_end/test_speed.py::test_the_collector_of_garbage_is_given_back_and_the_meter_has_measured",
    ),
    "get_batch_samples": Stock(
        ("65fe983a5316",),
        "what it returns, and how targets are counted over processes",
        "tests/end_to_end/test_batch.py::test_the_loss_does_not_depend_on_accumulation_where_micro_batches_have_unequal_numbers_of_targets",
    ),
    "training_step": Stock(
        ("1563bbe55202", "45bbd339b753"),
        "what is done between two micro-batches beside the loss: context managers, scaling, emptying of caches",
        "tests/end_to_end/test_speed.py::test_fast_and_stock_train_the_same",
    ),
    "compute_loss": Stock(
        ("dcd0994c2015", "1b4042b1ae64"),
        "what the loss is divided by, and what is added to it",
        "tests/end_to_end/test_speed.py::test_the_router_loss_is_apart_and_does_not_grow_with_accumulation",
    ),
    "create_optimizer": Stock(
        ("8687851e1881", "ab57acfb95e4"),
        "how groups and arguments are made, and what is kept on the trainer",
        "tests/clm/test_muon.py::test_each_parameter_is_in_exactly_one_group",
    ),
    "_move_model_to_device": Stock(
        ("1428db706ecc",),
        "what is done beside moving it",
        "tests/end_to_end/test_tp.py::test_tensor_parallel_on_two_processes_is_one_process_and_any_layout_goes_on",
    ),
    "_get_train_sampler": Stock(
        ("726bd2c713ec",),
        "its arguments, and who calls it",
        "tests/end_to_end/test_launch.py::test_two_processes_give_the_losses_of_one_and_resume_as_one",
    ),
    "get_train_dataloader": Stock(
        ("35d591087e38",),
        "that its `base_dataloader` still draws its seed from `generator`",
        "tests/end_to_end/test_resume.py::test_a_killed_run_ends_with_the_losses_and_weights_of_an_uninterrupted_one",
    ),
    "_get_grad_norm": Stock(
        ("879dcba334e7",),
        "its arguments, and that it comes before the update",
        "tests/end_to_end/test_spikes.py::test_skipped_steps_move_nothing_and_the_schedule_goes_on",
    ),
    "get_decay_parameter_names": Stock(
        ("f2132a14fb69",),
        "who calls it, and what the names are used for",
        "tests/end_to_end/test_optimizers.py::test_an_optimizer_by_trainers_name_learns_resumes_bit_by_bit_and_decays_matrices_only",
    ),
    "floating_point_ops": Stock(
        ("deacad1a134b",),
        "the formula",
        "tests/test_overrides.py::test_the_floating_point_operations_are_counted_as_stock_counts_them",
    ),
    "create_scheduler": Stock(
        ("8d7913712953",),
        "what it keeps on the trainer, and when it is called",
        "tests/clm/test_schedule.py::test_rates_are_those_of_the_formula",
    ),
    "_load_from_checkpoint": Stock(
        ("ed489c9a71a7", "d8dfc8210cdc"),
        "which files are read, into which model",
        "tests/end_to_end/test_fsdp.py::test_fsdp_on_two_processes_is_one_process_and_any_layout_goes_on_from_its_shards",
    ),
    "_load_optimizer_and_scheduler": Stock(
        ("1123d887f1c7", "1ae280a7e712"),
        "which files are read, and the learning rate after it",
        "tests/end_to_end/test_fork.py::test_extending_a_cosine_says_that_the_rate_jumps_and_uses_the_new_one_at_once",
    ),
    "evaluate": Stock(
        ("cdabc2dd1133",),
        "what it calls, returns and logs",
        "tests/clm/test_evaluate.py::test_the_sums_are_those_of_a_plain_loop",
    ),
    "log": Stock(
        ("7fbf9683b96e",),
        "what is kept in the state, and which callbacks hear of it",
        "tests/end_to_end/test_run.py::test_a_run_writes_everything_the_contract_names",
    ),
    "_get_output_dir": Stock(
        ("9bc393cd4604",),
        "who else asks for the folder of a checkpoint",
        "tests/end_to_end/test_launch.py::test_zero_on_two_processes_gives_the_losses_and_the_weights_of_one",
    ),
    "_save_checkpoint": Stock(
        ("d9833db7afa9",),
        "which files a checkpoint has, and what the state holds then (clm/contents.py)",
        "tests/end_to_end/test_checkpoints.py::test_a_checkpoint_holds_what_stock_would_have_written",
    ),
    "save_model": Stock(
        ("2087abb7d8bc", "891842af4f28"),
        "which branch DeepSpeed and FSDP take",
        "tests/end_to_end/test_launch.py::test_zero_on_two_processes_gives_the_losses_and_the_weights_of_one",
    ),
    "init_hf_repo": Stock(
        ("a7de7fa27445", "da67ef717d41"),
        "what it sets on the trainer",
        "tests/end_to_end/test_push_while_training.py::test_a_hub_that_refuses_is_told_before_the_training",
    ),
    "_push_from_checkpoint": Stock(
        ("7ed9d9a5f63d", "a8e4156fde35"),
        "who calls it, and when",
        "tests/end_to_end/test_push_while_training.py::test_a_checkpoint_strategy_pushes_what_a_resume_needs",
    ),
}

# Done again here, outside of the Trainer: name -> (where, ...)
DONE_AGAIN = {
    "transformers.trainer.Trainer._save_rng_state": (
        "clm.contents.random_state",
        Stock(
            ("44abaf4bed21",),
            "what the file holds",
            "tests/end_to_end/test_checkpoints.py::test_a_checkpoint_holds_what_stock_would_have_written",
        ),
    ),
    "transformers.trainer.Trainer._load_rng_state": (
        "clm.contents.random_state",
        Stock(
            ("e01e6c6b6d40",),
            "what the file must hold",
            "tests/end_to_end/test_resume.py::test_a_killed_run_ends_with_the_losses_and_weights_of_an_uninterrupted_one",
        ),
    ),
    "transformers.trainer.Trainer._save_optimizer_and_scheduler": (
        "clm.contents.collect",
        Stock(
            ("2a7409cf6ddd",),
            "names and contents of the files",
            "tests/end_to_end/test_checkpoints.py::test_a_checkpoint_holds_what_stock_would_have_written",
        ),
    ),
    "transformers.trainer.Trainer._save_scaler": (
        "clm.contents.collect",
        Stock(
            ("7adf96028c12",),
            "name and content of the file",
            "tests/end_to_end/test_checkpoints.py::test_a_checkpoint_holds_what_stock_would_have_written",
        ),
    ),
    "transformers.trainer.Trainer._get_num_items_in_batch": (
        "FastSteps._take_batches",
        Stock(
            ("a69ce112ad8a", "bd60705153f5"),
            "what counts as a target, and how processes add up",
            "tests/end_to_end/test_batch.py::test_two_processes_with_unequal_numbers_of_targets_and_three_with_fillers_are_one_process",
        ),
    ),
    "transformers.trainer.Trainer._maybe_log_save_evaluate": (
        "ClmTrainer.log and RunFlow",
        Stock(
            ("1a527d62ee57",),
            "the order of logging, evaluation and saving, and how the mean loss is made",
            "tests/end_to_end/test_resume.py::test_a_checkpoint_between_two_log_points_keeps_the_mean_that_was_being_built",
        ),
    ),
    "transformers.loss.loss_utils.ForCausalLMLoss": (
        "clm.loss_only",
        Stock(
            ("8a922c2d5877",),
            "the shift, the dtype and what it divides by",
            "tests/clm/test_loss_only.py::test_loss_and_gradients_are_those_of_transformers",
        ),
    ),
    "transformers.loss.loss_utils.fixed_cross_entropy": (
        "clm.loss_only",
        Stock(
            ("b0a307f42f64",),
            "what it divides by",
            "tests/clm/test_loss_only.py::test_loss_and_gradients_are_those_of_transformers",
        ),
    ),
    "transformers.integrations.moe.grouped_mm_experts_forward": (
        "clm.mixed_precision",
        Stock(
            ("065d6ccff15e", "03827035c0e6"),
            "what it reads of the module, and in which dtype it multiplies",
            "tests/clm/test_mixed_precision.py::test_experts_follow_autocast_which_transformers_do_not",
        ),
    ),
}


def code_hash(function: object) -> str:
    """A hash of a function's lines of code; layout within a line counts, which Python's version does not change."""
    source = textwrap.dedent(inspect.getsource(function))
    body = ast.parse(source).body[0]
    lines = source.splitlines()
    first = body.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        lines[first.lineno - 1 : first.end_lineno] = []
    kept = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:12]


def overrides() -> dict[str, list[type]]:
    """The methods of Trainer that our classes have too, but __init__, which calls the whole of stock's."""
    found: dict[str, list[type]] = {}
    for ours in (FastSteps, ClmTrainer):
        for name in vars(ours):
            if name != "__init__" and inspect.isfunction(getattr(Trainer, name, None)):
                found.setdefault(name, []).append(ours)
    return found


def find(path: str) -> object:
    """The function of a dotted path."""
    return pkgutil.resolve_name(path)


def assert_known(name: str, function: object, ours: str, stock: Stock) -> None:
    now, version = code_hash(function), transformers.__version__
    assert now in stock.hashes, (
        f"transformers {version} has changed {name} ({inspect.getsourcefile(function)}:"
        f"{inspect.getsourcelines(function)[1]}), in whose place stands {ours}. Compare: {stock.compare}. See what "
        f"changed since {NEWEST}, run {stock.test}, follow it where it matters, and add {now!r} to "
        "tests/test_overrides.py."
    )


def test_every_override_is_listed_and_says_what_it_replaces():
    found = overrides()
    assert found.keys() == OVERRIDDEN.keys(), "an override was added or removed: list what it replaces, and its test"
    for name, classes in found.items():
        for ours in classes:
            text = inspect.getdoc(vars(ours)[name]) or ""
            assert re.search(r"\bstock\b|\breplaces\b", text, flags=re.IGNORECASE), f"{ours.__name__}.{name}: {text!r}"


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_what_is_overridden_is_what_it_was(name):
    ours = " and ".join(f"{each.__name__}.{name}" for each in overrides().get(name, []))
    assert_known(f"Trainer.{name}", getattr(Trainer, name), ours, OVERRIDDEN[name])


@pytest.mark.parametrize("path", DONE_AGAIN)
def test_what_is_done_again_is_what_it_was(path):
    ours, stock = DONE_AGAIN[path]
    assert_known(path, find(path), ours, stock)


def test_every_comparison_that_is_named_exists():
    for stock in [*OVERRIDDEN.values(), *(stock for _, stock in DONE_AGAIN.values())]:
        path, _, function = stock.test.partition("::")
        assert f"def {function}(" in (ROOT / path).read_text(encoding="utf-8"), stock.test


def test_a_change_is_told_in_words():
    def changed(self):
        """Other words."""
        return "another training step"

    with pytest.raises(AssertionError) as failure:
        assert_known("Trainer.training_step", changed, "FastSteps.training_step", OVERRIDDEN["training_step"])
    message = str(failure.value)
    assert "has changed Trainer.training_step" in message and OVERRIDDEN["training_step"].compare in message
    assert code_hash(changed) in message, "what to add"


def test_words_and_comments_do_not_count_and_code_does():
    def plain():
        def same(x):
            return x + 1

        return same

    def with_words():
        def same(x):
            """A docstring."""

            # and a comment
            return x + 1

        return same

    def other():
        def same(x):
            return x + 2

        return same

    assert code_hash(plain()) == code_hash(with_words()) != code_hash(other())


def test_the_floating_point_operations_are_counted_as_stock_counts_them():
    trainer = ClmTrainer.__new__(ClmTrainer)  # of which this method needs two attributes
    trainer.model, trainer._flops_per_token = make_model(), None
    inputs = {"input_ids": torch.zeros(4, 32, dtype=torch.int64)}
    stock = Trainer.floating_point_ops(trainer, inputs)
    # 2 x (2 x 32 x 32 + 2 x 32 x 16 + 3 x 32 x 64) in the blocks, 5 x 32 in norms, 384 x 32 in the head
    assert trainer.floating_point_ops(inputs) == stock == 6 * 128 * (2 * 9_216 + 160 + 12_288)
