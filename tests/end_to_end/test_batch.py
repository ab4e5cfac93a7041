"""One global batch, dealt out in every way: the same loss, also with unequal numbers of targets and with fillers."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.errors import UserError

from .conftest import losses, quiet_config, read_metrics, recorded
from .test_launch import TORCHRUN, launch

ROWS = "training.per_device_train_batch_size="


def curve(run) -> np.ndarray:
    """Losses and gradient norms."""
    return np.array([(r["loss"], r["grad_norm"]) for r in read_metrics(run) if "loss" in r])


def test_the_loss_does_not_depend_on_accumulation_where_micro_batches_have_unequal_numbers_of_targets(train, recipe):
    # 16 rows in a step; the mask takes the first token of each document out of the targets
    short = [quiet_config(recipe), "data.tokens=1536", "data.document_mask=true", "data.validation=[]"]
    together = curve(train(*short, f"{ROWS}16", name="16x1"))
    assert len(together) == 3
    assert np.allclose(curve(train(*short, f"{ROWS}2", name="2x8")), together, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_fillers_where_the_batch_does_not_divide_change_nothing(train, recipe, capsys):
    short = [quiet_config(recipe), "data.tokens=1536", "data.document_mask=true", "run.record_blocks=true"]
    even = train(*short, name="even")
    with pytest.raises(UserError, match="Use 384 or 576, or another .* or keep it with run.uneven_batch: true"):
        train(*short, f"{ROWS}6", name="refused")
    capsys.readouterr()
    uneven = train(*short, f"{ROWS}6", "run.uneven_batch=true", name="uneven")
    assert "3 accumulation = 576 tokens, of which 512 count: 11.1 % of the work is filling" in capsys.readouterr().out
    assert np.allclose(curve(uneven), curve(even), rtol=1e-6, atol=1e-6)
    assert recorded(uneven) == recorded(even)
    with pytest.raises(UserError, match="must be a multiple of the prepared blocks' 64. Use 448 or 512"):
        train(*short, "data.tokens_per_step=500", "run.uneven_batch=true", name="refused")


@pytest.mark.slow
def test_two_processes_with_unequal_numbers_of_targets_and_three_with_fillers_are_one_process(train, recipe):
    short = [quiet_config(recipe), "data.tokens=2560", "data.document_mask=true", "training.save_steps=2"]
    one = train(*short, name="one")
    for number, rows, more in (("2", 4, []), ("3", 8, ["run.uneven_batch=true"])):
        run = [*short, f"{ROWS}{rows}", f"training.run_name=on-{number}", *more]
        done = launch(*TORCHRUN[:-1], number, "run_clm.py", str(recipe), *run)
        assert done.returncode == 0, done.stderr
        several = one.with_name(f"on-{number}")
        assert np.allclose(list(losses(several).values()), list(losses(one).values()), rtol=1e-5)
    # the run of three, of which one was lost, goes on with two
    for path in (several / "final", several / "checkpoint-5"):
        path.rename(path.with_name(f"gone-{path.name}"))
    done = launch(*TORCHRUN, "run_clm.py", str(recipe), *short, *more, "training.run_name=on-3")
    assert done.returncode == 0 and "continuing from" in done.stdout, done.stderr
    assert np.allclose(list(losses(several).values()), list(losses(one).values()), rtol=1e-5)
