"""Tries a micro-batch in a process of its own: writes its recipe, starts clm/tune_trial.py, reads what that says.

In: a candidate. Out: its times and memory, or that it does not fit. A measured step has at most FEW micro-batches; a
step of the real run is put together from its parts:

    seconds of a step = accumulation x a micro-step + what comes once per step
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from clm.plan import Plan
from clm.timeline import Stage
from clm.tune_search import Candidate
from data_prep.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
FEW = 4  # micro-batches of a measured step, where the real one has more
WARM_UP = 2  # steps that compile, and take the memory that later ones find
LAST_LINES = 12  # of a trial that failed
LOOK_S = 0.1  # between two looks at a trial
# Of a training section: what says when something is written or how the rate runs, which is no matter of speed.
_LEFT_OUT = ("hub_", "push_to_hub", "warmup_", "lr_scheduler_", "eval_", "save_", "logging_", "report_to")


class Lab:
    """Starts trials.

    Args:
        folder: for their recipes, logs and run folders.
        plan: the real run's.
        stage: the one that is tried.
        num_steps: measured ones, at least.
    """

    def __init__(self, folder: Path, plan: Plan, stage: Stage, num_steps: int):
        self.folder, self.plan, self.stage = folder, plan, stage
        self.num_steps, self.num_started = num_steps, 0
        self.device = ""  # its name, after the first trial
        self.device_bytes: int | None = None  # memory of a GPU

    def measure(self, candidate: Candidate) -> None:
        """Try it, and add what was measured to it.

        Raises:
            UserError: it ended otherwise than at its end or for want of memory.
        """
        self.num_started += 1
        recipe = self.folder / f"trial-{self.num_started}.yaml"
        text = yaml.safe_dump(trial_recipe(self.plan, self.stage, candidate, self.num_steps), sort_keys=False)
        recipe.write_text(text, encoding="utf-8")
        order = json.dumps({"recipe": str(recipe), "steps": self.num_steps, "warm_up": WARM_UP})
        output, code = self._run(order, f"micro-batch of {candidate.rows} rows")
        said = last_line(output)
        if "done" in said:
            done = said["done"]
            for step in done["steps"]:
                candidate.steps.append(candidate.accumulation * step["micro_s"] + step["once_s"])
            candidate.peak_bytes = max(candidate.peak_bytes, done["peak_bytes"])
            self.device, self.device_bytes = done["device"], done.get("device_bytes")
        elif "error" in said:
            raise UserError(said["error"])
        elif "out_of_memory" in said or code == -signal.SIGKILL or "bad_alloc" in output:
            candidate.is_out_of_memory = not candidate.steps
        else:
            end = "\n".join(output.strip().splitlines()[-LAST_LINES:])
            path = self.plan.recipe.path
            raise UserError(
                f"{path}: the trial of {candidate.rows} rows ended with code {code}. What it said last:\n{end}"
            )

    def _run(self, order: str, what: str) -> tuple[str, int]:
        """Run one to its end, showing how far it is; what it said and its exit code.

        A new process, not a copy of one that has everything imported: CUDA does not survive a fork.
        """
        log = self.folder / f"trial-{self.num_started}.txt"
        path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
        with open(log, "wb") as file, _progress_line() as show:
            trial = subprocess.Popen(
                [sys.executable, "-m", "clm.tune_trial", order],
                env={**os.environ, "RUNS_DIR": str(self.folder / "runs"), "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us
            )
            try:
                while trial.poll() is None:
                    said = last_line(_read(log))
                    show(f"  {what}: step {said['step']} of {said['of']}" if "step" in said else f"  {what}: starts")
                    time.sleep(LOOK_S)
            finally:
                with contextlib.suppress(ProcessLookupError):  # it, and what it has started
                    os.killpg(trial.pid, signal.SIGKILL)
                code = trial.wait()
        return _read(log), code


def _read(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def trial_recipe(plan: Plan, stage: Stage, candidate: Candidate, num_steps: int) -> dict[str, Any]:
    """The recipe as one stage, with a global batch of at most FEW micro-batches, and nothing that is written."""
    from clm.tune_trial import MOST_STEPS

    document, prepared = plan.recipe.to_dict(), plan.prepared_block_size
    data, run, training = document["data"], document["run"], document["training"]
    tokens_per_step = min(FEW, candidate.accumulation) * candidate.samples * prepared
    shares = zip(plan.recipe.data.datasets, stage.shares, strict=True)
    data.update(
        mixture=[{"dataset": name, "weight": float(share)} for name, share in shares if share],
        stages=[],
        block_size=stage.block_size,
        tokens_per_step=tokens_per_step,
        tokens=tokens_per_step * (WARM_UP + max(num_steps, MOST_STEPS) + 1),  # more than it makes
        validation=[],
        max_epochs=1e9,
    )
    document["model"]["rope"] = {**plan.recipe.model.rope, **dict(stage.rope)}
    if run["spikes"]["policy"] == "rollback":  # it needs checkpoints
        run["spikes"]["policy"] = "report"
    run.update(preflight=False, samples={}, uneven_batch=False)
    run.update(schedule_tokens=None, warmup_tokens=None, decay_tokens=None)
    for name in [name for name in training if name.startswith(_LEFT_OUT)]:
        del training[name]
    training.update(
        run_name="trial",
        per_device_train_batch_size=candidate.samples * prepared // stage.block_size,
        lr_scheduler_type="constant",
        eval_strategy="no",
        save_strategy="no",
        logging_steps=WARM_UP + max(num_steps, MOST_STEPS) + 1,
    )
    empty = {"stages"}
    return {
        name: {k: v for k, v in section.items() if v is not None and (v or k not in empty)}
        for name, section in document.items()
    }


def last_line(output: str) -> dict[str, Any]:
    """The newest whole line that a trial has said to us, {} for none."""
    for line in reversed(output.splitlines()):
        if line.startswith('{"tune": '):
            with contextlib.suppress(json.JSONDecodeError):  # the file was read in the middle of a write
                return json.loads(line)["tune"]
    return {}


@contextlib.contextmanager
def _progress_line() -> Iterator[Callable[[str], None]]:
    """A line on the terminal that is written over and taken away; nothing where there is no terminal."""
    shown = ""

    def show(text: str) -> None:
        nonlocal shown
        if sys.stderr.isatty() and text != shown:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        shown = text

    try:
        yield show
    finally:
        show("")
