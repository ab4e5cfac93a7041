"""Waits for orders between two steps of a training, and answers with what the ordered steps took.

In, on stdin, one order per line: `3` makes three steps, `3 examine` also counts what waits for the device and names the
kernels of attention, `3 evaluate` evaluates after them. Out: a JSON line for each order, when the device is done.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from typing import Any

import torch

# Parts of the names of attention kernels on a GPU: cuDNN's, Flash's, the memory-efficient one's, FlexAttention's.
ATTENTION = ("flash", "fmha", "attention", "sdpa")
EXAMINED = {"cpu": 2, "cuda": 4}  # steps of an examination; the first one's end is its beginning
SYNCHRONIZING = "called a synchronizing CUDA operation"  # torch.cuda.set_sync_debug_mode


class Turns:
    """One process's side of the orders."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.left = 0
        self.how = ""
        self.losses: list[torch.Tensor | float] = []
        self.began_at = self.cpu_began_at = 0.0
        self.examination: Examination | None = None
        self.channel = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever prints, prints to stderr

    @property
    def wants_evaluation(self) -> bool:
        """Whether the step that ends now is the last one before an evaluation that was ordered."""
        return self.how == "evaluate" and self.left == 1

    def before_step(self) -> bool:
        """Wait for an order where none is open; False at the end."""
        if self.left:
            return True
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # while others have their turn
        line = sys.stdin.readline()
        if not line.strip():
            return False
        number, _, self.how = line.strip().partition(" ")
        self.left = int(number)
        self.began_at, self.cpu_began_at = time.perf_counter(), time.process_time()
        return True

    def after_step(self, loss: torch.Tensor | float | None = None) -> None:
        """Count a step; answer after the last one of the order."""
        if loss is not None:
            self.losses.append(loss)
        self.left -= 1
        if self.how == "examine" and self.examination is None:
            self.examination = Examination(self.device, self.left)  # from the end of the first step: whole cycles
        if self.left:
            return
        peak, found = 0, {} if self.examination is None else self.examination.end()
        self.examination = None
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        answer = {"time_s": time.perf_counter() - self.began_at, "cpu_s": time.process_time() - self.cpu_began_at}
        answer |= {"peak_bytes": peak, "losses": [float(loss) for loss in self.losses], **found}
        self.losses.clear()
        print(json.dumps(answer), file=self.channel, flush=True)


class Examination:
    """What some steps do that their time does not tell: waits for the device, kernels of attention.

    A wait is what torch.cuda.set_sync_debug_mode warns of; on a CPU there is none.

    Args:
        num_steps: until `end`.
    """

    def __init__(self, device: torch.device, num_steps: int):
        self.device, self.num_steps = device, num_steps
        activity = torch.profiler.ProfilerActivity
        self.profile = torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] * (device.type == "cuda"))])
        self.profile.__enter__()
        self.caught = warnings.catch_warnings(record=True)
        self.warned = self.caught.__enter__()
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")

    def end(self) -> dict[str, Any]:
        """attention_kernels, and on a GPU syncs_per_step."""
        if self.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        self.caught.__exit__(None, None, None)
        self.profile.__exit__(None, None, None)
        events = self.profile.key_averages()
        if self.device.type == "cpu":
            return {"attention_kernels": sorted(e.key for e in events if "_scaled_dot_product" in e.key)}
        kernels = {e.key[:120] for e in events if e.device_type != torch.autograd.DeviceType.CPU}
        named = sorted(name for name in kernels if any(part in name.lower() for part in ATTENTION))
        num_waits = sum(SYNCHRONIZING in str(warning.message) for warning in self.warned)
        return {"attention_kernels": named, "syncs_per_step": num_waits / max(1, self.num_steps)}


def trainer_turns(turns: Turns) -> Any:
    """A callback that gives Trainer's steps to `turns`."""
    from transformers import TrainerCallback

    class TakeTurns(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if not turns.before_step():
                os._exit(0)

        def on_step_end(self, args, state, control, **kwargs):
            if turns.wants_evaluation:
                control.should_evaluate = True
            elif not control.should_log:
                turns.after_step()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in (logs or {}) and not turns.wants_evaluation:
                turns.after_step(logs["loss"])

        def on_evaluate(self, args, state, control, **kwargs):
            turns.after_step()

    return TakeTurns()
