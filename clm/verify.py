"""`python -m clm verify RECIPE`: is a killed and resumed run of this recipe the run that was never interrupted?

A small copy of the recipe (clm/verify_recipe.py) is trained four times on the CPU, with real processes:

    straight   to its end
    killed     the same, ended by SIGKILL at random moments and started again each time
    quiet      to its end, without dropout, whose masks belong to a layout
    moved      without dropout, killed and continued on other processes, micro-batches, accumulation and workers

killed must equal straight bit for bit, moved must have quiet's batches and its losses within LOSS_TOLERANCE.
In: a recipe and its prepared data. Out: runs/<name>/certificate.json and .txt, which the model card embeds.
"""

from __future__ import annotations

import random
import shutil
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clm.block_record import read_batches
from clm.certificate import Check, describe, fingerprint, write_certificate
from clm.fork_server import ROOT, ForkServer, Training
from clm.plan import Plan
from clm.recipe import load_recipe
from clm.run_folder import list_checkpoints, read_metrics
from clm.verify_recipe import SAVE_STEPS, Layout, load_copy, overrides_for, plan_whole, write_copies
from data_prep.errors import UserError
from data_prep.paths import runs_dir

LOSS_TOLERANCE = 1e-5  # another layout adds the same numbers in another order; fp32
FAILED = 1  # exit code
START_WITHIN_S = 600


class Lab:
    """Starts the copies' trainings and reads what they leave.

    Args:
        server: starts them.
        folder: for runs and logs.
    """

    def __init__(self, server: ForkServer, folder: Path):
        self.server, self.folder, self.runs = server, folder, folder / "runs"
        self.runs.mkdir(parents=True, exist_ok=True)
        self.num_starts = 0
        self.kills: list[dict[str, Any]] = []

    def start(self, recipe: Path, plan: Plan, layout: Layout) -> list[Training]:
        """Start a run, or start it again; one process for each rank."""
        self.num_starts += 1
        together: dict[str, str] = {}
        if layout.num_processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            together["WORLD_SIZE"] = str(layout.num_processes)
        command = [ROOT / "run_clm.py", recipe, f"training.run_name={plan.recipe.name}", *overrides_for(plan, layout)]
        ranks = []
        for rank in range(layout.num_processes):
            env = {"RUNS_DIR": str(self.runs)}
            if together:
                env |= {**together, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            log = self.folder / f"{plan.recipe.name}-{self.num_starts}-{rank}.txt"
            ranks.append(self.server.start(command, log, env))
        return ranks

    def finish(self, recipe: Path, plan: Plan, layout: Layout) -> None:
        """Train to the end.

        Raises:
            UserError: it ended before; says with what.
        """
        ranks = self.start(recipe, plan, layout)
        for rank in ranks:
            code = rank.wait(24 * 3600)
            if code != 0:
                last = (rank.output.strip().splitlines() or ["nothing"])[-1]
                raise UserError(f"{recipe}: the small copy's training ended with {code}: {last}\nAll of it: {rank.log}")

    def kill(self, recipe: Path, plan: Plan, layout: Layout, rng: random.Random, after: int) -> None:
        """Start it, and SIGKILL it at a random moment after step `after` is done: in a step, or while it saves."""
        run, ranks = self.runs / plan.recipe.name, self.start(recipe, plan, layout)
        is_in_save = rng.random() < 0.5
        deadline = time.monotonic() + START_WITHIN_S
        reached_at = None
        delay = rng.random()  # of a step
        while ranks[0].poll() is None and time.monotonic() < deadline:
            if reached_at is None and last_step(run) >= after:
                reached_at = time.monotonic()
                time.sleep(delay * step_seconds(run))
            if reached_at is not None and (not is_in_save or (run / ".saving").exists()):
                break
            if reached_at is not None and time.monotonic() - reached_at > SAVE_STEPS * step_seconds(run):
                break  # the save was over between two looks
            time.sleep(0.001)
        for rank in rng.sample(ranks, len(ranks)):
            rank.kill()
        codes = [rank.wait() for rank in ranks]
        if codes[0] == -9:
            is_in_save = (run / ".saving").exists()
            steps = [step for step, _ in list_checkpoints(run)]
            kill = {"run": plan.recipe.name, "layout": str(layout), "after_step": last_step(run)}
            self.kills.append({**kill, "in_a_save": is_in_save, "newest_checkpoint": max(steps, default=None)})
        elif codes[0] != 0:
            raise UserError(f"{recipe}: the small copy's training ended with {codes[0]}. What it said: {ranks[0].log}")
        elif not any(kill["run"] == plan.recipe.name for kill in self.kills):
            raise UserError(f"{recipe}: the small copy's training ended before it could be killed. Raise --steps.")


def verify_recipe(
    path: str,
    overrides: Sequence[str] = (),
    num_kills: int = 3,
    num_steps: int = 24,
    num_processes: int = 2,
    seed: int | None = None,
) -> int:
    """Verify a recipe and print its certificate; the exit code, 0 when all is equal.

    Args:
        path: the recipe.
        overrides: section.key=value, as for run_clm.py.
        num_kills: of the run that keeps its layout.
        num_steps: of the small copy.
        num_processes: of the other layout.
        seed: for the random moments; None: the time's.
    Raises:
        UserError: the recipe has a mistake, its data is not prepared, or the copy cannot be trained here.
    """
    seed = time.time_ns() % 1_000_000 if seed is None else seed
    original = load_recipe(path, list(overrides))
    whole = plan_whole(load_recipe(path, list(overrides)))
    run_folder = runs_dir() / original.name
    run_folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="verify-", dir=run_folder))
    try:
        copies = write_copies(whole, folder, num_steps, num_processes)
        plans = {name: load_copy(copies[name in ("straight", "killed")], name) for name in _RUNS}
        copy = plans["straight"]
        print(f"verify {path}: a tiny model, {copy.num_steps} steps, {len(copy.timeline.stages)} stages; seed {seed}")
        kills = _train_all(folder, copies, plans, num_kills, num_processes, random.Random(seed))
        checks = compare(folder / "runs", copy)
    except KeyboardInterrupt:
        shutil.rmtree(folder)
        raise
    certificate = write_certificate(run_folder, original, whole, copy, checks, kills, seed)
    print(describe(certificate))
    if not certificate["passed"]:
        print(f"FAILED. The runs and their logs stay in {folder}")
        return FAILED
    shutil.rmtree(folder)
    print(f"{run_folder / 'certificate.json'}: the model card of this run embeds it")
    return 0


def _train_all(
    folder: Path,
    copies: dict[bool, Path],
    plans: dict[str, Plan],
    num_kills: int,
    num_processes: int,
    rng: random.Random,
) -> list[dict[str, Any]]:
    """Train the four runs; when and where they were killed."""
    num_steps, started_at = plans["straight"].num_steps, time.monotonic()
    first, spread, single = Layout(1, 2, 0), Layout(num_processes, 1, 2), Layout(1, 1, 0)

    def say(text: str) -> None:
        print(f"  {time.monotonic() - started_at:6.1f} s  {text}", flush=True)

    with ForkServer({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}) as server:
        lab = Lab(server, folder)
        lab.finish(copies[True], plans["straight"], first)
        say("straight: trained to its end")
        for after in _moments(rng, num_kills, num_steps):
            lab.kill(copies[True], plans["killed"], first, rng, after)
            say("killed: SIGKILL")
        lab.finish(copies[True], plans["killed"], first)
        say("killed: resumed, trained to its end")
        lab.finish(copies[False], plans["quiet"], first)
        say("quiet: trained to its end, without dropout")
        for layout, after in zip((first, spread), _moments(rng, 2, num_steps), strict=True):
            lab.kill(copies[False], plans["moved"], layout, rng, after)
            say(f"moved: SIGKILL to {layout}")
        lab.finish(copies[False], plans["moved"], single)
        say(f"moved: trained to its end on {single}")
        return lab.kills


_RUNS = ("straight", "killed", "quiet", "moved")


def _moments(rng: random.Random, count: int, num_steps: int) -> list[int]:
    """Steps after which to kill, in order; 0 is before the first one is done, the last ones leave time for a kill."""
    moments = range(max(2, num_steps - 2 * SAVE_STEPS))
    return sorted(rng.sample(moments, min(count, len(moments))))


def compare(runs: Path, plan: Plan) -> list[Check]:
    """All that has to be equal, looked up in the four runs' folders."""
    straight, killed, quiet, moved = (runs / name for name in _RUNS)
    expected = {step: plan.timeline.samples_of_step(step).tolist() for step in range(1, plan.num_steps + 1)}
    checks = [
        Check.equal("order", "blocks of each step", expected, {s: b for s, (b, _) in batches(straight).items()}),
        Check.equal("killed", "blocks and tokens of each step", batches(straight), batches(killed)),
        Check.equal("killed", "loss of each step", column(straight, "loss"), column(killed, "loss")),
        Check.equal("killed", "learning rate of each step", rates(straight), rates(killed)),
    ]
    for file, what in (("optimizer.pt", "optimizer"), ("scheduler.pt", "scheduler"), ("rng_state.pth", "random state")):
        before, after = (_last_state(run, file) for run in (straight, killed))
        checks.append(Check.equal("killed", f"{what} after the last step", before, after))
    checks.append(Check.equal("killed", "final weights", _weights(straight), _weights(killed)))
    ordered = [{s: sorted(b) for s, (b, _) in batches(run).items()} for run in (quiet, moved)]
    checks += [
        Check.equal("moved", "blocks of each step", *ordered),
        Check.equal("moved", "learning rate of each step", rates(quiet), rates(moved)),
        Check.close("moved", "loss of each step", column(quiet, "loss"), column(moved, "loss"), LOSS_TOLERANCE),
    ]
    return checks


def batches(run: Path) -> dict[int, tuple[list[int], list[str]]]:
    """Step -> samples, and a hash of their tokens for each rank."""
    return {
        step: ([sample for record in ranks for sample in record["samples"]], [record["sha256"] for record in ranks])
        for step, ranks in read_batches(run).items()
    }


def column(run: Path, key: str) -> dict[int, float]:
    """Step -> value, of the training lines of metrics.jsonl."""
    return {r["step"]: r[key] for r in read_metrics(run) if "loss" in r}


def rates(run: Path) -> dict[int, float]:
    """Step -> learning rate."""
    return column(run, "learning_rate")


def last_step(run: Path) -> int:
    """The last step that metrics.jsonl shows, 0 for none."""
    return max((r["step"] for r in read_metrics(run) if "loss" in r), default=0)


def step_seconds(run: Path) -> float:
    """How long a step takes, from what metrics.jsonl shows so far."""
    lines = [r for r in read_metrics(run) if "loss" in r]
    return lines[-1]["time_s"] / lines[-1]["step"] if lines else 0.1


def _last_state(run: Path, file: str) -> str:
    import torch

    _, checkpoint = list_checkpoints(run)[-1]
    return fingerprint(torch.load(checkpoint / file, map_location="cpu", weights_only=False))


def _weights(run: Path) -> str:
    from safetensors.torch import load_file

    return fingerprint(load_file(run / "final" / "model.safetensors"))
