"""What a run writes while it trains: metrics.jsonl, train.log, the progress bar, curve.svg.

metrics.jsonl has one JSON object per log point; a line is written with a single write and flushed, and on resume the
file is cut back to the checkpoint's step, so that no line is torn and no step appears twice.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from clm.checkpoint import FULL_DISK

log = logging.getLogger("clm")


def setup_logging(run: Path | None, is_main: bool) -> None:
    """Messages go to the terminal as they are and to train.log with a time; other ranks only warn."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO if is_main else logging.WARNING)
    terminal = _TqdmHandler()
    terminal.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(terminal)
    if run is not None and is_main:
        file = _LogFile(run / "train.log", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(file)


class _LogFile(logging.FileHandler):
    """Goes without a line that cannot be written: the terminal has it, and a full disk is told of otherwise."""

    def handleError(self, record: logging.LogRecord) -> None:  # the name is logging's
        pass


class _TqdmHandler(logging.Handler):
    """Prints above a running progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def cut_back(path: Path, step: int) -> None:
    """Drop the lines of a .jsonl after `step`, and a torn last line."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record.get("step", 0) <= step and not record.get("finished"):
            kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def cut_back_run(run: Path, step: int) -> None:
    """Drop what a run wrote after `step`, -1 for all of it; each rank its own files."""
    rank = int(os.environ.get("RANK", "0"))
    for name in ("metrics.jsonl", "samples.jsonl", "blocks-0.jsonl") if rank == 0 else (f"blocks-{rank}.jsonl",):
        cut_back(run / name, step)


class JsonLines:
    """Appends records to a .jsonl file, one write each. What a full disk does not take waits for the next write."""

    def __init__(self, path: Path):
        self.path = path
        self._waiting = ""

    def write(self, record: dict[str, Any]) -> None:
        """Append one record and flush it."""
        self._waiting += json.dumps(record) + "\n"
        content = self._waiting.encode()
        try:
            with open(self.path, "ab", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                if file.write(content) < len(content):
                    file.truncate(end)  # no torn line
                    return
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
        else:
            self._waiting = ""


class Progress(TrainerCallback):
    """A bar with loss, learning rate, tokens/s and time left; lines where there is no terminal.

    Replaces Trainer's ProgressCallback, which knows no tokens. `seconds` is the training time over all resumes,
    evaluation and saving included; how fast the steps are is the meter's (clm/meter.py).
    """

    def __init__(self, tokens_per_step: int, show: bool, as_bar: bool | None = None):
        self.tokens_per_step = tokens_per_step
        self.show = show
        self.as_bar = sys.stderr.isatty() if as_bar is None else as_bar
        self.bar: tqdm | None = None
        self.seconds_before = 0.0  # of the resumed checkpoint
        self.started_at = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Training time of this run, all its resumes together."""
        return self.seconds_before + time.perf_counter() - self.started_at

    def on_train_begin(self, args, state, control, **kwargs):
        self.started_at = time.perf_counter()
        if self.show and self.as_bar:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(1)

    def report(self, record: dict[str, Any], max_steps: int) -> None:
        """Show one training log point."""
        rate = record.get("tokens_per_s")
        speed = f"{rate:,.0f} tok/s" if rate else ""
        if "mfu" in record:
            speed += f", MFU {record['mfu']:.1%}"
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {record['loss']:.3f}, lr {record['learning_rate']:.2e}, {speed}")
        elif self.show:
            left = (max_steps - record["step"]) * self.tokens_per_step / rate if rate else 0
            log.info(
                "step %s/%s  loss %.4f  lr %.3e  grad norm %.3f  %s  left %s",
                f"{record['step']:,}",
                f"{max_steps:,}",
                record["loss"],
                record["learning_rate"],
                record.get("grad_norm") or float("nan"),
                speed,
                tqdm.format_interval(left),
            )

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None
