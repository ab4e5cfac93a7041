"""One micro-batch tried: a process that trains a few steps of a recipe and says what they took, or that memory is out.

    python -m clm.tune_trial '{"recipe": "trial.yaml", "steps": 5, "warm_up": 2}'       started by clm/tune_lab.py

In: a recipe whose global batch is a few micro-batches of the real one (clm/tune_lab.py writes it). Out: JSON lines, the
last of them `done`, `out_of_memory` or `error`. It is run_clm.py's own trainer on the recipe's own data; only that
nothing is evaluated, logged or saved.

A step is taken apart, so that one of the real run can be put together from it:

    micro_s    forward and backward of a micro-batch, and waiting for it
    once_s     the rest of a step: clipping, optimizer, schedule, callbacks

On a GPU these are times of its own clock, and nothing waits for it within the measured steps.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import resource
import signal
import sys
import time
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import TrainerCallback

from clm.launch import make_arguments
from clm.meter import mark_time, seconds_between
from clm.model import build_planned_model
from clm.plan import make_plan
from clm.recipe import load_recipe
from clm.trainer import ClmTrainer
from data_prep.errors import UserError
from data_prep.memory import available_memory

MOST_STEPS = 100  # measured ones
SAY_S = 0.2  # between two lines of progress
SECONDS = 3.0  # measure for so long where steps are short
# Beside what accelerate knows; the first is C++'s, the others cuBLAS's and the kernel's.
ALLOCATION_FAILED = ("bad_alloc", "out of memory", "STATUS_ALLOC_FAILED", "Cannot allocate memory", "can't allocate")


class Done(Exception):
    """Enough steps are measured."""


def say(**record: Any) -> None:
    """One line for clm/tune.py, at once."""
    print(json.dumps({"tune": record}), flush=True)


class Stopwatch(TrainerCallback):
    """Notes the ends of micro-steps and steps, and raises Done after the last one.

    Args:
        device: where the model runs.
        steps: measured ones, at least.
        warm_up: steps before them, which compile and take memory.
    """

    def __init__(self, device: torch.device, steps: int, warm_up: int):
        self.device, self.num_steps, self.warm_up = device, steps, warm_up
        self.began_at = self.said_at = 0.0
        self.marks: list[list[Any]] = []  # of each step: its beginning, the end of each micro-step, its end
        self.first: Any = None  # the end of the warm-up

    def on_step_begin(self, args, state, control, **kwargs):
        self.marks.append([mark_time(self.device)])

    def on_substep_end(self, args, state, control, **kwargs):
        self.marks[-1].append(mark_time(self.device))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.marks[-1].append(mark_time(self.device))  # the last micro-step, and the clipping of gradients with it

    def on_step_end(self, args, state, control, **kwargs):
        self.marks[-1].append(mark_time(self.device))
        step = state.global_step
        if step == self.warm_up - 1:
            self._wait()
            self.began_at = time.perf_counter()
        elif step == self.warm_up:
            self._wait()
            seconds = time.perf_counter() - self.began_at
            self.num_steps = min(MOST_STEPS, max(self.num_steps, math.ceil(SECONDS / max(seconds, 1e-6))))
            self.first = mark_time(self.device)
            self.marks.clear()
        if time.perf_counter() - self.said_at > SAY_S:
            say(step=step, of=self.warm_up + self.num_steps)
            self.said_at = time.perf_counter()
        if step == self.warm_up + self.num_steps:
            self._wait()
            raise Done

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def take(self) -> list[dict[str, float]]:
        """Of each measured step: `micro_s`, `once_s`, and `num_micro_steps` of which it consisted."""
        found, before = [], self.first
        for begin, *ends, end in self.marks:
            whole, waited = seconds_between(before, end), seconds_between(before, begin)
            borders = [begin, *ends]
            each = [seconds_between(a, b) for a, b in zip(borders, borders[1:], strict=False)]
            # where there are several, the last one is measured together with the clipping of gradients
            micro = sum(each[:-1]) / (len(each) - 1) if len(each) > 1 else each[0]
            micro += waited / len(each)
            found.append({"micro_s": micro, "once_s": whole - micro * len(each), "num_micro_steps": len(each)})
            before = end
        return found


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller micro-batch may help."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    is_known = isinstance(error, Exception) and should_reduce_batch_size(error)
    return is_known or (isinstance(error, RuntimeError | OSError) and any(part in text for part in ALLOCATION_FAILED))


def limit_memory() -> None:
    """On a CPU: let an allocation beyond what the machine has fail; otherwise the kernel ends some process."""
    room = available_memory()
    if room is None or not sys.platform.startswith("linux"):
        return
    with open("/proc/self/status", encoding="ascii") as file:
        used = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData:"))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = used + room if hard == resource.RLIM_INFINITY else min(used + room, hard)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def measure(recipe_path: str, steps: int, warm_up: int) -> dict[str, Any]:
    """Train, and return what was measured.

    Raises:
        UserError: the recipe cannot be trained here.
    """
    plan = make_plan(load_recipe(recipe_path), 1)
    stage = plan.timeline.stages[0]
    args = make_arguments(plan, stage)
    if args.device.type == "cpu":
        limit_memory()
    plan.run_folder.mkdir(parents=True, exist_ok=True)
    trainer = ClmTrainer(plan, stage, build_planned_model(plan, stage), args)
    trainer.spikes.start(None)
    trainer.progress.show = False
    stopwatch = Stopwatch(args.device, steps, warm_up)
    trainer.add_callback(stopwatch)
    with contextlib.suppress(Done):
        trainer.train()
    found: dict[str, Any] = {"steps": stopwatch.take()}
    if args.device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
        found["device"] = torch.cuda.get_device_name()
        found["device_bytes"] = torch.cuda.get_device_properties(0).total_memory
    else:
        found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found["device"] = f"CPU, {torch.get_num_threads()} {'thread' if torch.get_num_threads() == 1 else 'threads'}"
    return found


def main() -> None:
    order = json.loads(sys.argv[1])
    with contextlib.suppress(AttributeError, OSError):  # other systems have no prctl
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG: not to live on without clm/tune.py
    try:
        say(done=measure(order["recipe"], order["steps"], order["warm_up"]))
        os._exit(0)  # taking everything down takes as long as some steps
    except UserError as error:
        say(error=str(error))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        say(out_of_memory=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)


if __name__ == "__main__":
    main()
