"""Checkpoints of several processes: on one disk, and each on a disk of its own, as nodes without a shared one have."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from clm.checkpoint import find_damage
from clm.run_folder import list_checkpoints

from .conftest import losses, quiet_config
from .test_checkpoints import CHECKPOINT_BYTES, steps

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def train_on_nodes(recipe: Path, folders: list[Path], *overrides: str) -> list[subprocess.CompletedProcess[str]]:
    """One process on each of some nodes, which see no disk of the others; the folders are their RUNS_DIR."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(len(folders)), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, ROOT / "run_clm.py", recipe, "data.tokens=5120", "training.run_name=two", *overrides],
            env={**os.environ, **common, "RANK": str(rank), "RUNS_DIR": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, folder in enumerate(folders)
    ]
    try:
        outputs = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [subprocess.CompletedProcess(p.args, p.returncode, *o) for p, o in zip(processes, outputs, strict=True)]


def test_nodes_without_a_shared_disk_each_hold_a_checkpoint_and_resume_from_one_that_all_have(train, recipe, tmp_path):
    quiet = quiet_config(recipe)
    one = train(quiet, "data.tokens=5120", name="one")
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    done = train_on_nodes(recipe, nodes, quiet)
    assert [d.returncode for d in done] == [2, 2], done[0].stderr
    assert "training.save_on_each_node: true" in done[0].stderr

    each = [quiet, "training.save_on_each_node=true"]
    done = train_on_nodes(recipe, nodes, *each)
    assert [d.returncode for d in done] == [0, 0], done[0].stderr + done[1].stderr
    runs = [node / "two" for node in nodes]
    for rank, run in enumerate(runs):
        assert steps(run) == [5, 10] and all(find_damage(path) is None for _, path in list_checkpoints(run))
        files = json.loads((run / "checkpoint-10" / "checkpoint.json").read_text())["files"]
        assert {"model.safetensors", "optimizer.pt", f"rng_state_{rank}.pth"} <= set(files)
        assert f"rng_state_{1 - rank}.pth" not in files
    expected = losses(runs[0])
    assert list(expected.values()) == pytest.approx(list(losses(one).values()), rel=1e-5)

    for run in runs:
        shutil.rmtree(run / "final")
    damaged = runs[1] / "checkpoint-10" / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    done = train_on_nodes(recipe, nodes, *each)
    assert [d.returncode for d in done] == [0, 0], done[0].stderr + done[1].stderr
    assert "checkpoint-10: optimizer.pt has" in done[0].stdout and "continuing from" in done[0].stdout
    assert "checkpoint-5 (step 5" in done[0].stdout
    assert losses(runs[0]) == expected, "bit for bit: the same layout"

    for run in runs:
        shutil.rmtree(run / "final")
    shutil.rmtree(runs[0] / "checkpoint-10")
    done = train_on_nodes(recipe, nodes, *each)
    assert "process 0 does not have it complete" in done[0].stdout and done[0].returncode == 0
    assert losses(runs[0]) == expected


def test_two_processes_go_on_together_when_a_checkpoint_does_not_fit(train, recipe, tmp_path):
    runs = tmp_path / "small"
    runs.mkdir()
    size = 2 * CHECKPOINT_BYTES + 250_000
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", runs], capture_output=True).returncode:
        pytest.skip("only root can mount a file system of a few bytes")
    try:
        keep = ["run.retention={last: 9}", "run.preflight=false", "training.save_steps=3"]
        done = train_on_nodes(recipe, [runs, runs], *keep)  # one disk
        assert done[0].returncode == 2, done[0].stderr
        assert done[0].stdout.count("was not saved: process 0: the disk is full") >= 1
        assert "cannot be written, process 0: the disk is full" in done[0].stderr and "Traceback" not in done[0].stderr
        assert steps(runs / "two") == [3, 6]
        assert all(find_damage(path) is None for _, path in list_checkpoints(runs / "two"))
        assert sorted(losses(runs / "two")) == list(range(1, 11))
        done = train_on_nodes(recipe, [runs, runs], "run.retention={last: 1}", "training.save_steps=3")
        assert [d.returncode for d in done] == [0, 0], done[0].stderr
        assert steps(runs / "two") == [10] and (runs / "two" / "final").is_dir()
    finally:
        subprocess.run(["umount", "-l", runs], check=True)
