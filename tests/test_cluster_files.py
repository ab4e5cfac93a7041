"""The files for clusters: what they say fits the project and itself, and their scripts do what they promise."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

ROOT = Path(__file__).parents[1]
KUBERNETES, SKYPILOT = ROOT / "cluster" / "kubernetes.yaml", ROOT / "cluster" / "skypilot.yaml"


def test_scripts_are_valid_bash():
    task = yaml.safe_load(SKYPILOT.read_text())
    for script in ((ROOT / "cluster" / "slurm.sh").read_text(), task["setup"], task["run"]):
        assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""


def test_the_kubernetes_manifest_agrees_with_itself():
    manifest = yaml.safe_load(KUBERNETES.read_text())
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    options = dict(arg[2:].split("=") for arg in container["args"] if arg.startswith("--"))
    assert spec["parallelism"] == spec["completions"] == int(options["nnodes"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(options["nproc_per_node"])
    # JobSet's name of the first pod: <set>-<job>-<index of the job>-<index of the pod>.<set>
    name = manifest["metadata"]["name"]
    assert options["rdzv_endpoint"] == f"{name}-{job['name']}-0-0.{name}:{container['ports'][0]['containerPort']}"
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    recipe, *overrides = [arg for arg in container["args"] if not arg.startswith("--")][1:]
    assert (ROOT / recipe).is_file() and overrides == ["run.uneven_batch=true"]
    environment = {each["name"]: each["value"] for each in container["env"]}
    save_in = int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert save_in < spec["template"]["spec"]["terminationGracePeriodSeconds"]


def test_the_recipe_of_the_skypilot_file_is_there():
    assert (ROOT / yaml.safe_load(SKYPILOT.read_text())["envs"]["RECIPE"]).is_file()


@pytest.mark.slow
def test_the_skypilot_script_goes_on_where_the_lost_machine_was(tmp_path, prepared):
    """Each machine is an empty folder with the code in it; the bucket is a folder beside them."""
    from tiny import CONFIG

    bucket = tmp_path / "bucket"
    shutil.copytree(prepared.folder, bucket / "data" / "tiny")
    task = yaml.safe_load(SKYPILOT.read_text())

    def start(machine: str) -> tuple[subprocess.Popen, Path]:
        here = tmp_path / machine
        here.mkdir()
        for name in ("clm", "data_prep", "run_clm.py"):
            (here / name).symlink_to(ROOT / name)
        (here / "config.json").write_text(json.dumps(CONFIG))
        (here / "tiny.yaml").write_text(RECIPE)
        env = {name: value for name, value in os.environ.items() if name not in ("DATA_DIR", "RUNS_DIR")}
        env |= {name: str(value) for name, value in task["envs"].items()}
        env |= {"RECIPE": "tiny.yaml", "PLACE": str(bucket), "PYTHON": sys.executable}
        env |= {"SKYPILOT_NUM_GPUS_PER_NODE": "1", "PYTHONPATH": str(here), "OMP_NUM_THREADS": "1"}
        with open(here / "log", "w") as log:
            command = ["bash", "-c", task["run"].replace("&\n", "--every 0.2 &\n", 1)]  # sooner than each minute
            return subprocess.Popen(command, cwd=here, env=env, stdout=log, stderr=log, start_new_session=True), here

    process, here = start("first")
    listing = bucket / "runs" / "tiny" / "mirror.json"
    deadline = time.monotonic() + 150
    while not (listing.exists() and "checkpoint-" in listing.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, (here / "log").read_text()
        time.sleep(0.05)
    machine = psutil.Process(process.pid)  # it is gone, with its disk; torchrun's processes lead groups of their own
    lost = [machine, *machine.children(recursive=True)]
    for each in lost:
        with contextlib.suppress(psutil.NoSuchProcess):  # a short-lived one
            each.kill()
    assert not psutil.wait_procs(lost, timeout=60)[1]
    assert not (here / "runs" / "tiny" / "final").exists(), "killed too late to show anything"
    shutil.rmtree(here)
    process, here = start("second")
    assert process.wait(timeout=200) == 0, (here / "log").read_text()
    log = (here / "log").read_text()
    assert "is back from" in log and "final (" in log
    assert (bucket / "runs" / "tiny" / "final" / "model.safetensors").is_file()
    assert sorted(path.name for path in (here / "runs" / "tiny").glob("checkpoint-*"))


RECIPE = """\
model:
  config: config.json
data:
  mixture: [{dataset: tiny, weight: 1.0}]
  block_size: 32
  tokens: 102_400
  tokens_per_step: 512
training:
  per_device_train_batch_size: 8
  learning_rate: 1e-2
  lr_scheduler_type: cosine
  warmup_steps: 0.1
  eval_strategy: "no"
  save_steps: 20
"""
