"""Where trainings are killed: starts them from a fork server with the fault library preloaded, and looks at the ruins.

What a complete checkpoint is, is decided here from the files alone, without the product's own code.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tiny import CONFIG

from clm.fork_server import ForkServer, Training

ROOT = Path(__file__).parents[2]

RECIPE = """\
model:
  config: {config}
data:
  mixture: [{{dataset: {dataset}}}]
  block_size: 32
  tokens: 6 * 512
  tokens_per_step: 512
  validation: []
run:
  retention: {{last: 1}}
training:
  per_device_train_batch_size: 8
  learning_rate: 1e-2
  lr_scheduler_type: cosine_with_min_lr
  lr_scheduler_kwargs: {{min_lr_rate: 0.1}}
  warmup_steps: 0.1
  logging_steps: 1
  save_steps: 2
  seed: 3
"""

# What accelerate_configs/fsdp2.yaml makes a launcher set, and what allows it on a CPU.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "CLM_FSDP_ON_CPU": "1",
}

# What a run writes beside its checkpoints: not part of a save.
NOT_A_SAVE = ".jsonl:train.log:curve.svg:recipe.yaml:recipe.tmp:.lock:final:.ranks"


class Fault(NamedTuple):
    """Which file operation fails, and how; see fault.c."""

    kind: str
    at: int
    begin: str = ""
    lasting: int = 0
    but: str = NOT_A_SAVE
    rank: str = ""


class Lab:
    """A recipe, a folder of runs, and a server to start trainings from.

    Args:
        server: with the fault library preloaded where there is a compiler.
        folder: for the recipe, the runs and the logs.
        dataset: a prepared one.
    """

    def __init__(self, server: ForkServer, folder: Path, dataset: Path):
        self.server, self.folder, self.runs = server, folder, folder / "runs"
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "tiny_config.json"
        config.write_text(json.dumps(CONFIG))
        self.recipe = folder / "tiny.yaml"
        self.recipe.write_text(RECIPE.format(config=config, dataset=dataset).replace("6 * 512", str(6 * 512)))

    def start(
        self,
        name: str,
        *overrides: str,
        fault: Fault | None = None,
        count_in: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Training:
        """Start run `name`; its output goes to a log of its own for every start.

        Args:
            fault: what goes wrong.
            count_in: a file for the list of its file operations.
        """
        environment = {"RUNS_DIR": str(self.runs), **(env or {})}
        if fault is not None or count_in is not None:
            fault = fault or Fault("", 0)
            environment |= {
                "FAULT_UNDER": str(self.runs / name),
                "FAULT_FROM": fault.begin,
                "FAULT_EXCEPT": fault.but,
                "FAULT_KIND": fault.kind,
                "FAULT_AT": str(fault.at),
                "FAULT_FOR": str(fault.lasting),
                "FAULT_RANK": fault.rank,
                "FAULT_LOG": str(count_in or ""),
            }
        log = self.folder / f"{name}-{len(list(self.folder.glob(f'{name}-*.txt')))}.txt"
        command = [ROOT / "run_clm.py", self.recipe, *overrides, f"training.run_name={name}"]
        return self.server.start(command, log, environment)

    def start_ranks(
        self,
        name: str,
        num_processes: int,
        *overrides: str,
        fault: Fault | None = None,
        env: Mapping[str, str] | None = None,
    ) -> list[Training]:
        """Start run `name` on several processes, as a launcher that only starts them: nobody ends the others."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        together = {
            **(env or {}),
            "WORLD_SIZE": str(num_processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        return [
            self.start(name, *overrides, fault=fault, env={**together, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(num_processes)
        ]

    def train(self, name: str, *overrides: str, env: Mapping[str, str] | None = None) -> Path:
        """Run to the end; the run's folder."""
        training = self.start(name, *overrides, env=env)
        code = training.wait()
        assert code == 0, training.output
        return self.runs / name

    def operations(self, name: str, *overrides: str, begin: str = "", but: str = NOT_A_SAVE) -> list[str]:
        """The file operations of an undisturbed run, as "name path": number N is the one that Fault(at=N) disturbs."""
        file = self.folder / f"{name}-operations"
        training = self.start(name, *overrides, fault=Fault("", 0, begin, 0, but), count_in=file)
        assert training.wait() == 0, training.output
        return [line.partition(" ")[2] for line in file.read_text().splitlines()]


def find_fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint-<step> folder, or None; by its manifest, read with no code of the product."""
    try:
        manifest = json.loads((checkpoint / "checkpoint.json").read_text())
    except (OSError, ValueError) as error:
        return f"{checkpoint.name}/checkpoint.json: {error}"
    if manifest["step"] != int(checkpoint.name.partition("-")[2]):
        return f"{checkpoint.name} is of step {manifest['step']}"
    state = (
        ("sharded/.metadata",) if "sharded/.metadata" in manifest["files"] else ("model.safetensors", "optimizer.pt")
    )
    for name in (*state, "scheduler.pt", "trainer_state.json"):
        if name not in manifest["files"]:
            return f"{checkpoint.name}: no {name}"
    for name, facts in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != facts["num_bytes"]:
            return f"{checkpoint.name}/{name}: missing, or not {facts['num_bytes']} bytes"
        if hashlib.sha256(path.read_bytes()).hexdigest() != facts["sha256"]:
            return f"{checkpoint.name}/{name}: another content"
    return None


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of the folders named checkpoint-<step>, each of which must be complete."""
    folders = {int(p.name.partition("-")[2]): p for p in run.glob("checkpoint-*")}
    faults = [fault for fault in map(find_fault, folders.values()) if fault]
    assert not faults, faults
    return sorted(folders)


def resumable_step(run: Path) -> int | None:
    """The step that the next start has to continue from: of the newest complete checkpoint, which may lack only its
    rename out of the folder it was written in."""
    steps = checkpoint_steps(run)
    for path in run.glob(".saving/checkpoint-*"):
        if find_fault(path) is None:
            steps.append(int(path.name.partition("-")[2]))
    return max(steps, default=None)


def resumed_from(training: Training) -> int | None:
    """The step a start said it continues from."""
    found = re.search(r"continuing from \S*checkpoint-(\d+)", training.output)
    return int(found[1]) if found else None


def weights(run: Path) -> bytes:
    """The final model's."""
    return (run / "final" / "model.safetensors").read_bytes()


def losses(run: Path) -> list[tuple[int, float, float]]:
    """(step, loss, learning rate) of each training line of metrics.jsonl, in order."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["learning_rate"]) for r in records if "loss" in r]


def last_step(run: Path) -> int:
    """The last step that metrics.jsonl shows, 0 for none; a torn last line counts for nothing."""
    steps = [0]
    if (run / "metrics.jsonl").is_file():
        for line in (run / "metrics.jsonl").read_text().splitlines():
            try:
                steps.append(json.loads(line)["step"])
            except ValueError:
                break
    return steps[-1]


def assert_same_run(run: Path, straight: Path) -> None:
    """Final weights bit for bit, and every step once with the same loss and learning rate."""
    assert losses(run) == losses(straight)
    assert weights(run) == weights(straight)


def leftovers(run: Path) -> list[str]:
    """What is in a run's folder and not meant to stay."""
    return sorted(p.name for p in run.iterdir() if p.name.startswith((".trash", ".saving", ".final", ".tmp")))
