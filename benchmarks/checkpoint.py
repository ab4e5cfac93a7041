"""How long does training stand still while a checkpoint is written, in the background and not?

    make prep DATASET=stdlib
    python benchmarks/checkpoint.py            prints JSON lines and a table
    python benchmarks/checkpoint.py --fsdp2 2  the same with FSDP2 on two processes

The Llama of llama_170m.json, with the vocabulary of the demo's data, is trained for 9 steps with a save after every
third, in turns with `run.save_in_background` true and false. What is reported is what the run itself logs: the seconds
for which training waited, and those until the checkpoint was complete (written, flushed, hashed, renamed).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SAVED = re.compile(r"saved checkpoint-(\d+): (.+) in ([\d.]+) s, training waited ([\d.]+) s")
OVERRIDES = ["data.tokens=9216", "data.validation=[]", "run.samples.prompts=[]", "run.preflight=false"]
OVERRIDES += ["training.save_steps=3", "training.logging_steps=1", "training.per_device_train_batch_size=2"]


def main() -> None:
    """Train in turns, print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3, help="pairs of runs; default: 3")
    parser.add_argument("--config", default="model_configs/llama_170m.json", help="default: llama_170m.json")
    parser.add_argument("--fsdp2", type=int, default=0, metavar="N", help="divided among N processes (on a CPU too)")
    arguments = parser.parse_args()
    launcher = [sys.executable]
    if arguments.fsdp2:
        os.environ["CLM_FSDP_ON_CPU"] = "1"
        launcher = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            "accelerate_configs/fsdp2.yaml",
        ]
        launcher += ["--num_processes", str(arguments.fsdp2), "--main_process_port", "0"]
    found: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    size = ""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.json")
        config.write_text(json.dumps({**json.loads((ROOT / arguments.config).read_text()), "vocab_size": 4096}))
        for number in range(arguments.repeat):
            for mode in ("true", "false"):
                size, saves = _train(launcher, Path(folder), config, mode, f"{mode}-{number}")
                for step, all_s, waited_s in saves:
                    found.setdefault((mode, step == 3), []).append((all_s, waited_s))
                    record = {"save_in_background": mode == "true", "repetition": number, "step": step}
                    print(json.dumps({**record, "all_s": all_s, "waited_s": waited_s}), flush=True)
    print(f"\na checkpoint has {size}; medians of {arguments.repeat} runs, in seconds\n")
    print("| run.save_in_background | save | training waited | until it was complete |\n|---|---|---|---|")
    for (mode, is_first), values in found.items():
        all_s, waited_s = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"| {mode} | {'the first' if is_first else 'later ones'} | {waited_s:.2f} | {all_s:.2f} |")


def _train(
    launcher: list[str], folder: Path, config: Path, mode: str, name: str
) -> tuple[str, list[tuple[int, float, float]]]:
    """One run; the size of a checkpoint, and (step, seconds until complete, seconds waited) of each save."""
    command = [*launcher, ROOT / "run_clm.py", "recipes/demo.yaml", f"model.config={config}", *OVERRIDES]
    command += [f"run.save_in_background={mode}", f"training.run_name={name}"]
    env = {**os.environ, "RUNS_DIR": str(folder)}
    done = subprocess.run([str(word) for word in command], cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    found = SAVED.findall(done.stdout)
    return found[-1][1], [(int(step), float(all_s), float(waited_s)) for step, _, all_s, waited_s in found]


if __name__ == "__main__":
    main()
