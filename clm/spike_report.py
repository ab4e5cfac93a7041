"""What is told about a spike: one line on the terminal, a line in events.jsonl, the folder spikes/step-<N>/.

In: the bad steps as the detector saw them. Out: spikes/step-<N>/report.json (the steps before it, its samples and their
blocks) and beside it the text of its batch, written by clm/explain.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clm.checkpoint import write_json
from clm.events import read_events

if TYPE_CHECKING:
    from clm.plan import Plan
    from clm.spike_detector import Verdict

FOLDER = "spikes"
MAX_REPORTS = 20  # folders per run: a run that spikes all the time must not fill the disk with texts


def describe_spike(bad: Verdict, threshold: float) -> str:
    """One line: "step 1,234: loss 9.31 is 14.2 robust deviations above the last 128 steps (median 3.02)"."""
    if not math.isfinite(bad.loss):  # then the norm is none either
        return f"step {bad.step:,}: the loss is {bad.loss}"
    parts = []
    for name, value, z, median in (
        ("loss", bad.loss, bad.z_loss, bad.median_loss),
        ("gradient norm", bad.grad_norm, bad.z_grad_norm, bad.median_grad_norm),
    ):
        if not math.isfinite(value):
            parts.append(f"the {name} is {value}")
        elif z > threshold:
            parts.append(
                f"{name} {value:.4g} is {z:.1f} robust deviations above the last {bad.num_before} steps "
                f"(median {median:.4g})"
            )
    return f"step {bad.step:,}: {' and '.join(parts)}"


def is_number(bad: Verdict) -> bool:
    """Whether loss and gradient norm are finite."""
    return math.isfinite(bad.loss) and math.isfinite(bad.grad_norm)


def split_episodes(bad: Iterable[Verdict]) -> list[list[Verdict]]:
    """Bad steps that follow each other without a gap are one episode."""
    episodes: list[list[Verdict]] = []
    for verdict in bad:
        if episodes and episodes[-1][-1].step + 1 == verdict.step:
            episodes[-1].append(verdict)
        else:
            episodes.append([verdict])
    return episodes


def write_report(plan: Plan, episode: list[Verdict], recent: Iterable[Verdict], reason: str) -> tuple[Path | None, str]:
    """Write spikes/step-<N>/ for the first step of an episode.

    Args:
        plan: the run.
        episode: consecutive bad steps.
        recent: the steps up to the episode's end.
        reason: the line that was printed.
    Returns:
        (folder or None where the run has MAX_REPORTS, what the terminal's line ends with).
    """
    first = episode[0]
    samples = plan.timeline.samples_of_step(first.step)
    folder = _folder_for(plan.run_folder, first.step, samples.tolist())
    if folder is None:
        return None, f"no report: {plan.run_folder / FOLDER} has {MAX_REPORTS} already"
    folder.mkdir(parents=True, exist_ok=True)
    dataset, block = plan.order.block_at(samples)
    names = [str(split.folder) for split in plan.splits]
    write_json(
        folder / "report.json",
        {
            "step": first.step,
            "last_step": episode[-1].step,
            "reason": reason,
            "samples": samples.tolist(),
            "blocks": [[names[j], number] for j, number in zip(dataset.tolist(), block.tolist(), strict=True)],
            "steps": [_plain(v) for v in recent if v.step <= episode[-1].step],
        },
    )
    return folder, _write_text(plan.run_folder, first.step, folder)


def describe_history(run: Path) -> str | None:
    """For the model card: how many steps were bad, and what was done about them; None where there were none."""
    events = read_events(run)
    spikes = [event for event in events if event["event"] == "spike"]
    rollbacks = [event for event in events if event["event"] == "rollback"]
    if not spikes and not rollbacks:
        return None
    bad, skipped = _steps_of(spikes), _steps_of(event for event in spikes if event["is_skipped"])
    parts = [f"Spikes (loss or gradient norm far above the steps before, or no number): {_count(len(bad), 'step')}"]
    if skipped:
        parts.append(f"{_count(len(skipped), 'update')} skipped")
    if rollbacks:
        num_tokens = sum(event.get("num_tokens", 0) for event in rollbacks)
        parts.append(f"{_count(len(rollbacks), 'rollback')} that left out {num_tokens:,} tokens")
    return ", ".join(parts) + "."


def _steps_of(events: Iterable[dict[str, Any]]) -> set[int]:
    """The steps that events name; a resumed run may have met one twice."""
    return {step for event in events for step in range(event["step"], event["last_step"] + 1)}


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _folder_for(run: Path, step: int, samples: list[int]) -> Path | None:
    """step-<N>, or step-<N>-2 ... where a rollback has given the step other samples since; None: there are enough."""
    number, folder = 1, run / FOLDER / f"step-{step}"
    while folder.exists() and _samples_in(folder) != samples:
        number += 1
        folder = run / FOLDER / f"step-{step}-{number}"
    if not folder.exists() and len(list((run / FOLDER).glob("step-*"))) >= MAX_REPORTS:
        return None
    return folder


def _samples_in(folder: Path) -> list[int] | None:
    try:
        return json.loads((folder / "report.json").read_text(encoding="utf-8"))["samples"]
    except (OSError, ValueError, KeyError):
        return None


def _write_text(run: Path, step: int, folder: Path) -> str:
    from clm.explain import write_step_report

    try:
        write_step_report(run, step, folder)
    except Exception as error:  # whatever goes wrong in showing a batch, the training does not end for it
        return f"report: {folder} (its text cannot be shown: {error})"
    return f"text: {folder / 'text.html'}"


def _plain(verdict: Verdict) -> dict[str, Any]:
    """JSON has no NaN: numbers that are none become their names."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in verdict._asdict().items()
    }
