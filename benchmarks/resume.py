"""How long does a resume take at sample 10,000,000, compared with one at the beginning?

    make prep DATASET=stdlib
    python benchmarks/resume.py            prints JSON lines and a table

One checkpoint is made after step 1 of the demo recipe with a length of 10^7 samples and more, and copied with another
step number. Then, interleaved, both are resumed: seconds from `trainer.train()` to the first forward, and the seconds
that checking the checkpoint's files took before it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
POSITION = 10_000_000  # samples


def main() -> None:
    """Make the two runs, resume each several times, print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5, help="pairs of resumes; default: 5")
    repeat = parser.parse_args().repeat
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        _resume(runs, "near", until=1)
        far = POSITION // _samples_per_step(runs / "near")
        _copy_to_step(runs, far)
        seconds: dict[str, list[float]] = {"near": [], "far": []}
        checks: list[float] = []
        for number in range(repeat):
            for name, step in (("near", 1), ("far", far)):
                measured = _resume(runs, name, until=None)
                assert measured["step"] == step, measured
                seconds[name].append(measured["first_forward_s"])
                checks.append(measured["check_s"])
                print(json.dumps({"run": name, "repetition": number, **measured}), flush=True)
    near, away = (statistics.median(seconds[name]) for name in ("near", "far"))
    print(f"\n| resume at sample | seconds from train() to the first forward, median of {repeat} |\n|---|---|")
    print(f"| {POSITION // far:,} | {near:.3f} |\n| {POSITION:,} | {away:.3f} |")
    print(f"\ndifference {away - near:+.3f} s; checking the files before it: {statistics.median(checks):.3f} s")


def _resume(runs: Path, name: str, until: int | None) -> dict:
    """Start the run in a process of its own; it ends after step `until`, or (None) at its first forward."""
    command = [sys.executable, __file__, "--child", name, str(until)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "RUNS_DIR": str(runs)}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _child(name: str, until: str) -> None:
    sys.path.insert(0, str(ROOT))
    import run_clm
    from clm import launch
    from clm.trainer import ClmTrainer

    measured = {"check_s": 0.0}
    find_damage, train, step = launch.find_damage, ClmTrainer.train, ClmTrainer.training_step

    def timed_check(*args, **kwargs):
        started_at = time.perf_counter()
        try:
            return find_damage(*args, **kwargs)
        finally:
            measured["check_s"] += time.perf_counter() - started_at

    def timed_train(self, *args, **kwargs):
        measured["started_at"] = time.perf_counter()
        return train(self, *args, **kwargs)

    def timed_step(self, *args, **kwargs):
        if until != "None":
            if self.state.global_step == int(until):
                self.saver.finish()
                raise _EnoughError
            return step(self, *args, **kwargs)
        measured["first_forward_s"] = time.perf_counter() - measured.pop("started_at")
        measured["step"] = self.state.global_step
        raise _EnoughError

    launch.find_damage, ClmTrainer.train, ClmTrainer.training_step = timed_check, timed_train, timed_step
    overrides = ["data.tokens=10T", "data.max_epochs=1e9", "training.save_steps=1", "data.validation=[]"]
    try:
        run_clm.main(["recipes/demo.yaml", f"training.run_name={name}", *overrides, "run.preflight=false"])
    except _EnoughError:
        print(json.dumps(measured), flush=True)
        os._exit(0)


class _EnoughError(Exception):
    """What was to be measured is measured."""


def _samples_per_step(run: Path) -> int:
    sys.path.insert(0, str(ROOT))
    from clm.replay import open_replay

    return len(open_replay(run).timeline.samples_of_step(1))


def _copy_to_step(runs: Path, step: int) -> None:
    """The run `near` again as `far`, its only checkpoint with another step number and right checksums."""
    import torch

    from clm.checkpoint import _sha256_of_json

    far = Path(shutil.copytree(runs / "near", runs / "far"))
    os.rename(far / "checkpoint-1", far / f"checkpoint-{step}")
    checkpoint = far / f"checkpoint-{step}"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    (checkpoint / "trainer_state.json").write_text(json.dumps({**state, "global_step": step}))
    scheduler = torch.load(checkpoint / "scheduler.pt", weights_only=True)
    torch.save({**scheduler, "last_epoch": step}, checkpoint / "scheduler.pt")
    manifest = json.loads((checkpoint / "checkpoint.json").read_text())
    manifest["step"] = step
    for name, facts in manifest["files"].items():
        content = (checkpoint / name).read_bytes()
        facts.update(num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    manifest["sha256"] = _sha256_of_json({k: v for k, v in manifest.items() if k != "sha256"})
    (checkpoint / "checkpoint.json").write_text(json.dumps(manifest))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _child(*sys.argv[2:])
    else:
        main()
