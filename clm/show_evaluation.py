"""After an evaluation in training: its result in one line, the curve drawn anew, and texts from the model.

In: the metrics. Out: a line in the log, curve.svg and lines in samples.jsonl, all written by rank 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from clm.metrics import JsonLines, log

if TYPE_CHECKING:
    from clm.trainer import ClmTrainer


def show_evaluation(trainer: ClmTrainer, metrics: dict[str, Any]) -> None:
    """Say the result, redraw the curve, write samples. Called on all ranks: a model that is divided needs them all."""
    if trainer.is_world_process_zero():
        _say(trainer, metrics)
    if trainer.is_world_process_zero() or trainer.is_divided:
        _write_samples(trainer)


def _say(trainer: ClmTrainer, metrics: dict[str, Any]) -> None:
    bits = metrics["eval_bits_per_byte"]
    log.info(
        "step %s  validation loss %.4f  perplexity %.2f  bits per byte %s  (%s tokens in %.1f s)",
        f"{trainer.state.global_step:,}",
        metrics["eval_loss"],
        metrics["eval_perplexity"],
        "-" if bits is None else f"{bits:.4f}",
        f"{metrics['eval_num_tokens']:,}",
        metrics["eval_time_s"],
    )
    if "eval_ema_loss" in metrics:
        log.info("of the averaged weights (run.ema): validation loss %.4f", metrics["eval_ema_loss"])
    from clm.curve import draw_curve

    try:
        draw_curve(trainer.run_folder)
    except OSError as error:
        log.warning("curve.svg was not drawn: %s", error)


def _write_samples(trainer: ClmTrainer) -> None:
    settings = trainer.plan.recipe.run.samples
    if not settings.prompts or trainer.is_deepspeed_enabled:
        return
    from clm.sample import generate_samples

    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # sampling must not move the run's RNG
        texts = generate_samples(
            trainer.model,
            trainer.processing_class,
            list(settings.prompts),
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            seed=trainer.plan.seed,
            is_shared=trainer.is_divided,
        )
    if trainer.is_world_process_zero():
        for prompt, text in zip(settings.prompts, texts, strict=True):
            record = {"step": trainer.state.global_step, "tokens": trainer.num_tokens, "prompt": prompt, "text": text}
            JsonLines(trainer.run_folder / "samples.jsonl").write(record)
