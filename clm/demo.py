"""What `make demo` shows after training: did it learn, what does it write, is final/ that model, what comes next.

In: a finished run. Out: text on stdout, and the exit code of the reload proof, which runs in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from clm.curve import draw_curve
from clm.run_folder import find_run, model_folder, read_metrics, read_recipe
from clm.sample import default_prompts, format_samples, generate_samples, load_model
from clm.yardstick import describe_yardstick
from data_prep.errors import UserError

NEXT_STEPS = """On a machine with a GPU, the same two commands make a real model:

  make prep DATASET=fineweb
  make train RECIPE=recipes/llama_170m.yaml

Another dataset, your own text, a base model to continue, several GPUs: see docs/.
`make help` lists every command."""


def show_run(name: str) -> int:
    """`python -m clm demo`: show a finished run; returns 0 when final/ gave the training's validation loss again.

    Raises:
        UserError: the run has not finished.
    """
    run = find_run(name)
    if not (run / "final").is_dir():
        raise UserError(
            f"{run}: has not finished. The command that began it continues it: make demo, or make train RECIPE=..."
        )
    final = model_folder(run)
    command = [sys.executable, "-m", "clm", "reload", str(run)]
    proof = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # runs beside the rest
    print(_rule("Evaluation") + describe_evaluations(run))
    print(_rule("Three samples") + _three_samples(run))
    print(_rule("Yardstick") + describe_yardstick(run) + "\n")
    output, _ = proof.communicate()
    print(_rule("Loaded again in a fresh process") + output)
    print(_rule("Next") + f"model  {final}\ncard   {final / 'README.md'}\ncurve  {draw_curve(run)}\n\n{NEXT_STEPS}")
    return proof.returncode


def describe_evaluations(run: Path) -> str:
    """First and last evaluation of a run, one line each, and the size of the model and the run."""
    evaluations = [record for record in read_metrics(run) if "eval_loss" in record]
    resolved = read_recipe(run)["resolved"]
    lines = [f"{resolved['num_parameters']:,} parameters, {resolved['num_tokens']:,} tokens, {resolved['device']}"]
    for record in [*evaluations[:1], *evaluations[1:][-1:]]:
        bits = record.get("eval_bits_per_byte")
        loss, perplexity = record["eval_loss"], record["eval_perplexity"]
        line = f"step {record['step']:>6,}: validation loss {loss:.4f}, perplexity {perplexity:,.1f}"
        lines.append(line if bits is None else f"{line}, {bits:.3f} bits per byte")
    return "\n".join(lines) + "\n"


def _three_samples(run: Path) -> str:
    prompts = default_prompts(run)[:3]
    prompts = prompts if len(prompts) == 3 else [prompts[0]] * 3
    model, tokenizer = load_model(run)
    room = model.config.max_position_embeddings // 2
    if len(set(prompts)) == 1:
        texts = generate_samples(model, tokenizer, prompts[:1], max_new_tokens=min(80, room), num_per_prompt=3)
    else:
        texts = generate_samples(model, tokenizer, prompts, max_new_tokens=min(80, room))
    return format_samples(prompts, texts)


def _rule(title: str) -> str:
    return f"== {title} " + "=" * (76 - len(title)) + "\n"
