"""One tiny training on the plain transformers Trainer, and the same on this project's: the same words for both.

Both train the same model on the same prepared blocks, 512 tokens a step, in a folder per run with checkpoint-<step>.
"""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

from kill.lab import CONFIG, ROOT, Fault

from clm.fork_server import ForkServer, Training

ROWS_PER_STEP, BLOCK_SIZE = 16, 32
SETTINGS = {
    "steps": 12,
    "save_steps": 2,
    "keep": 3,
    "rows": 8,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "dropout": 0.1,
    "stop_on_sigterm": False,
}


class Program:
    """Starts trainings and reads what they leave.

    Args:
        server: starts them.
        folder: for runs, configs and a copy of the dataset.
        dataset: a prepared one of blocks of 64.
    """

    name = ""
    final_code = 0

    def __init__(self, server: ForkServer, folder: Path, dataset: Path):
        self.server, self.folder, self.runs = server, folder, folder / "runs"
        self.dataset = folder / "data"
        shutil.copytree(dataset, self.dataset)
        self.runs.mkdir()
        self.num_starts = 0

    def command(self, run: str, processes: int, settings: dict[str, Any]) -> list[str]:
        """Script and arguments."""
        raise NotImplementedError

    def losses(self, run: str) -> dict[int, tuple[float, float]]:
        """Step -> (loss, learning rate) as logged last."""
        raise NotImplementedError

    def batches(self, run: str) -> dict[int, set[str]]:
        """Step -> hashes of the rows of 64 tokens that it was trained on, of all processes, when it was last done."""
        raise NotImplementedError

    def config(self, dropout: float) -> Path:
        """A model config file."""
        path = self.folder / f"config-{dropout}.json"
        path.write_text(json.dumps({**CONFIG, "attention_dropout": dropout}))
        return path

    def start(self, run: str, processes: int = 1, fault: Fault | None = None, **changed: Any) -> list[Training]:
        """Start a run, or start it again; one Training for each process."""
        unknown = set(changed) - set(SETTINGS)
        assert not unknown, unknown
        command = self.command(run, processes, {**SETTINGS, **changed})
        env = {"RUNS_DIR": str(self.runs)}
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            env |= {"WORLD_SIZE": str(processes)}
        if fault is not None:
            env |= {"FAULT_UNDER": str(self.runs / run), "FAULT_FROM": fault.begin, "FAULT_EXCEPT": fault.but}
            env |= {"FAULT_KIND": fault.kind, "FAULT_AT": str(fault.at), "FAULT_FOR": str(fault.lasting)}
        self.num_starts += 1
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {} for rank in range(processes)]
        logs = [self.folder / f"log-{self.num_starts}-{rank}.txt" for rank in range(processes)]
        return [self.server.start(command, log, {**env, **rank}) for log, rank in zip(logs, ranks, strict=True)]

    def train(self, run: str, processes: int = 1, fault: Fault | None = None, **changed: Any) -> list[Training]:
        """Start a run and wait for its end."""
        ranks = self.start(run, processes, fault, **changed)
        for rank in ranks:
            rank.wait(120)
        return ranks

    def finish(self, run: str, processes: int = 1, **changed: Any) -> None:
        """Train to the end, which must succeed."""
        for rank in self.train(run, processes, **changed):
            assert rank.returncode == 0, f"ended with {rank.returncode}: {last_line(rank)}"

    def cut(self, run: str, step: int, processes: int = 1, **changed: Any) -> Path:
        """A run that is killed after the checkpoint of `step`, before anything of the next one is written."""
        save_steps = changed.get("save_steps", SETTINGS["save_steps"])
        self.train(run, processes, Fault("kill", 1, f"checkpoint-{step + save_steps}"), **changed)
        return self.runs / run / f"checkpoint-{step}"

    def weights(self, run: str) -> bytes:
        """The final model's."""
        return (self.runs / run / "final" / "model.safetensors").read_bytes()

    def assert_equal(self, run: str, straight: str) -> None:
        """The same logged losses and learning rates, and the same final weights, bit for bit."""
        ours, theirs = self.losses(run), self.losses(straight)
        different = sorted(step for step in theirs if ours.get(step) != theirs[step])
        assert not different, f"step {different[0]}: (loss, lr) {ours.get(different[0])}, not {theirs[different[0]]}"
        assert self.weights(run) == self.weights(straight), "other final weights"


def last_line(training: Training) -> str:
    """What a process said last."""
    return (training.output.strip().splitlines() or [""])[-1]


class Stock(Program):
    """transformers.Trainer, as its own run_clm.py uses it."""

    name = "stock"

    def command(self, run: str, processes: int, settings: dict[str, Any]) -> list[str]:
        arguments = {
            "output_dir": str(self.runs / run),
            "dataset": str(self.dataset),
            "config": str(self.config(settings["dropout"])),
            "max_steps": settings["steps"],
            "save_steps": settings["save_steps"],
            "save_total_limit": settings["keep"],
            "per_device_train_batch_size": settings["rows"],
            "gradient_accumulation_steps": ROWS_PER_STEP // settings["rows"] // processes,
            "learning_rate": settings["learning_rate"],
            "logging_steps": settings["logging_steps"],
            "enable_jit_checkpoint": settings["stop_on_sigterm"],
            "ddp_timeout": 60,
        }
        return [str(Path(__file__).with_name("train_stock.py")), json.dumps(arguments)]

    def losses(self, run: str) -> dict[int, tuple[float, float]]:
        records = [json.loads(line) for line in (self.runs / run / "log.jsonl").read_text().splitlines()]
        return {r["step"]: (r["loss"], r["learning_rate"]) for r in records}

    def batches(self, run: str) -> dict[int, set[str]]:
        found: dict[int, set[str]] = {}
        for file in (self.runs / run).glob("batches-*.jsonl"):
            for line in file.read_text().splitlines():
                record = json.loads(line)
                found.setdefault(record["step"], set()).update(record["rows"])
        return found


class Ours(Program):
    """run_clm.py."""

    name = "ours"

    def command(self, run: str, processes: int, settings: dict[str, Any]) -> list[str]:
        recipe = {
            "model": {"config": str(self.config(settings["dropout"]))},
            "data": {
                "mixture": [{"dataset": str(self.dataset)}],
                "block_size": BLOCK_SIZE,
                "tokens": settings["steps"] * ROWS_PER_STEP * BLOCK_SIZE,
                "tokens_per_step": ROWS_PER_STEP * BLOCK_SIZE,
                "validation": [],
            },
            "run": {"retention": {"last": settings["keep"]}, "record_blocks": True},
            "training": {
                "run_name": run,
                "per_device_train_batch_size": settings["rows"],
                "learning_rate": settings["learning_rate"],
                "logging_steps": settings["logging_steps"],
                "save_steps": settings["save_steps"],
                "ddp_timeout": 60,
            },
        }
        path = self.folder / f"{run}-{self.num_starts}.yaml"
        path.write_text(json.dumps(recipe))  # JSON is YAML
        return [str(ROOT / "run_clm.py"), str(path)]

    def losses(self, run: str) -> dict[int, tuple[float, float]]:
        records = [json.loads(line) for line in (self.runs / run / "metrics.jsonl").read_text().splitlines()]
        return {r["step"]: (r["loss"], r["learning_rate"]) for r in records if "loss" in r}

    def batches(self, run: str) -> dict[int, set[str]]:
        found: dict[int, set[str]] = {}
        for file in (self.runs / run).glob("blocks-*.jsonl"):
            for line in file.read_text().splitlines():
                record = json.loads(line)
                found.setdefault(record["step"], set()).update(map(str, record["samples"]))
        return found
