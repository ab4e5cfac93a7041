"""The demo from text to final/, as `make demo` runs it; and the same, killed at random moments."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from make_here import make

from clm.recipe import load_recipe

from .conftest import losses, read_metrics

ROOT = Path(__file__).parents[2]
RECIPE = load_recipe(ROOT / "recipes" / "demo.yaml").data
NUM_STEPS = 60  # and few validation tokens: seconds instead of minutes. A checkpoint every 4 steps, each step logged.
SHORT = [
    f"data.tokens={NUM_STEPS * RECIPE.tokens_per_step}",
    "data.validation=[{dataset: stdlib, tokens: 8192}]",
    "run.samples={}",
    "training.logging_steps=1",
    "training.save_steps=4",
    "training.eval_steps=20",
]
PREP = ["-m", "clm", "prep", "recipes/demo.yaml"]
TRAIN = ["run_clm.py", "recipes/demo.yaml", *SHORT]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_make_demo_ends_with_a_model_that_has_learned_and_does_nothing_the_second_time(run_cli, tmp_path):
    env = {"DATA_DIR": str(tmp_path / "data"), "RUNS_DIR": str(tmp_path / "runs")}
    done = make("demo", marks=tmp_path, env=env, timeout_s=1400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "reload: the same model" in done.stdout
    run = tmp_path / "runs" / "demo"
    assert (run / "final" / "model.safetensors").is_file() and (run / "curve.svg").is_file()
    records = read_metrics(run)
    final = next(record for record in reversed(records) if "eval_loss" in record)
    assert final["tokens"] == RECIPE.tokens and records[-1]["finished"]
    stat = run_cli(["-m", "data_prep", "stat", "stdlib"], env=env).stdout
    entropy = float(re.search(r"unigram entropy of train: ([0-9.]+) nats", stat)[1])
    print(f"validation loss {final['eval_loss']:.4f}, unigram entropy {entropy:.4f}, {records[-1]['time_s']:.0f} s")
    assert final["eval_loss"] < entropy - 1.0

    before = {path: path.stat().st_mtime_ns for path in (run / "metrics.jsonl", run / "final" / "model.safetensors")}
    used_s = processor_time_s()
    again = make("demo", marks=tmp_path, env=env)
    assert again.returncode == 0 and processor_time_s() - used_s < 60  # not by the clock: other tests run beside this
    assert "nothing to do" in again.stdout and "is finished" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_killed_at_random_moments_ends_with_the_same_losses_and_weights(tmp_path):
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 2**32))
    print(f"again with KILL_SEED={seed}")
    moments = random.Random(seed)
    straight, killed = Place(tmp_path / "straight"), Place(tmp_path / "killed")
    prep_s = straight.finish(PREP)
    straight.finish(TRAIN)

    killed.kill(PREP, after_s=moments.uniform(0.3, 0.9) * prep_s)
    killed.finish(PREP)
    first, second = sorted(moments.sample(range(1, NUM_STEPS - 1), 2))
    for step in (first, second):  # the kill comes somewhere within the step, its checkpoint or its evaluation
        killed.kill(TRAIN, after_s=moments.uniform(0, 1.5), after_step=step)
    killed.finish(TRAIN)

    assert killed.fingerprint() == straight.fingerprint()
    assert losses(killed.run) == losses(straight.run)
    assert sorted(losses(killed.run)) == list(range(1, NUM_STEPS + 1))
    weights = [(place.run / "final" / "model.safetensors").read_bytes() for place in (killed, straight)]
    assert weights[0] == weights[1]


def processor_time_s() -> float:
    """Processor seconds of all finished commands of this process."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class Place:
    """A folder of its own for the demo's data and runs."""

    def __init__(self, folder: Path):
        self.run = folder / "runs" / "demo"
        self.data = folder / "data"
        folders = {"DATA_DIR": str(self.data), "RUNS_DIR": str(self.run.parent)}
        self.env = {**os.environ, **folders, "OMP_NUM_THREADS": "1"}  # other tests run at the same time
        self.log = folder / "log"
        folder.mkdir()

    def start(self, arguments: list[str]) -> subprocess.Popen:
        """The command, with a process group of its own."""
        with open(self.log, "a") as log:
            command = [sys.executable, *arguments]
            return subprocess.Popen(command, cwd=ROOT, env=self.env, stdout=log, stderr=log, start_new_session=True)

    def finish(self, arguments: list[str]) -> float:
        """Run the command to its end; the seconds that took."""
        started_at = time.monotonic()
        code = self.start(arguments).wait(timeout=600)
        assert code == 0, self.log.read_text()
        return time.monotonic() - started_at

    def kill(self, arguments: list[str], after_s: float, after_step: int = 0) -> None:
        """Start the command; SIGKILL it and all it started so many seconds after it has logged the step."""
        process = self.start(arguments)
        try:
            while process.poll() is None and after_step and self.last_step() < after_step:
                time.sleep(0.02)
            time.sleep(after_s)
        finally:
            print(f"killed after step {self.last_step()}" if process.poll() is None else "finished before the kill")
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def last_step(self) -> int:
        """The newest step that is logged in metrics.jsonl."""
        file = self.run / "metrics.jsonl"
        steps = re.findall(r'^\{"step": (\d+)', file.read_text(), re.MULTILINE) if file.is_file() else []
        return int(steps[-1]) if steps else 0

    def fingerprint(self) -> str:
        """What the prepared data is."""
        return json.loads((self.data / "stdlib" / "manifest.json").read_text())["fingerprint"]
