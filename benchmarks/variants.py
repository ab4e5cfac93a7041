"""One way to train, as a process that makes steps when it is told to; throughput.py and parity.py compare them.

    python -m benchmarks.variants '{"variant": "ours", ...}'

In: `Settings` as JSON, then orders on stdin (benchmarks/turns.py): numbers of steps. Out: a JSON line per order.

    ours            run_clm.py's trainer: `run.speed: fast`, with the watch for spikes and signal handling on
    bare            the same HF model in a hand-written loop, with every trick that ours has
    stock           transformers' Trainer as its example run_clm.py uses it: defaults, Python lists, attention masks
    parity          transformers' Trainer, defaults, on our batches: for equal losses
    gpt             nanoGPT-style: a plain GPT block model of about as many matrix parameters, in the loop of bare
    litgpt          litgpt's model class with the same shape, in the loop of bare

`_compiled` behind a name compiles it, `ours_stock` is `run.speed: stock`, `ours_residual` has the residual stream in
bf16, `stock_liger` has Liger's kernels.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.turns import Turns, trainer_turns

LOGGING_STEPS = 10  # a usual number


@dataclasses.dataclass
class Settings:
    """What all variants share, and the variant."""

    variant: str
    config: str  # a file of model_configs/
    dataset: str  # prepared, in blocks of block_size
    block_size: int
    rows: int  # of a micro-batch
    accumulation: int
    num_steps: int  # at most so many are ever asked for
    bf16: bool = False
    use_cpu: bool = True
    seed: int = 1
    learning_rate: float = 1e-3
    attention: str = "auto"
    is_null: bool = False  # a model of one parameter and a free forward: what is left is the loop
    logs_losses: bool = False  # log each step, for equal losses
    evaluates: bool = False  # the dataset has a validation split, and ours may be told to evaluate

    @property
    def kind(self) -> str:
        """The variant without what is behind its name."""
        return self.variant.partition("_")[0]

    @property
    def is_compiled(self) -> bool:
        """torch.compile."""
        return self.variant.endswith("_compiled")

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return torch.device("cpu" if self.use_cpu else "cuda")


def run_ours(settings: Settings, turns: Turns) -> None:
    """The trainer of run_clm.py, from a recipe."""
    import yaml

    from clm.launch import make_arguments
    from clm.model import build_planned_model
    from clm.plan import make_plan
    from clm.recipe import load_recipe
    from clm.signals import Requests
    from clm.trainer import ClmTrainer

    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    os.environ["RUNS_DIR"] = str(folder)
    tokens_per_step = settings.rows * settings.block_size * settings.accumulation
    document = {
        "model": {
            "config": settings.config,
            "attention": settings.attention,
            "residual_dtype": "bf16" if "_residual" in settings.variant else "fp32",
        },
        "data": {
            "mixture": [{"dataset": settings.dataset}],
            "block_size": settings.block_size,
            "tokens": tokens_per_step * settings.num_steps,
            "tokens_per_step": tokens_per_step,
            "max_epochs": 1e9,
            "validation": [{"dataset": settings.dataset, "tokens": tokens_per_step}] if settings.evaluates else [],
        },
        "run": {"speed": "stock" if "_stock" in settings.variant else "fast", "preflight": False},
        "training": {
            "per_device_train_batch_size": settings.rows,
            "learning_rate": settings.learning_rate,
            "lr_scheduler_type": "constant",
            "torch_compile": settings.is_compiled,
            "bf16": settings.bf16,
            "use_cpu": settings.use_cpu,
            "save_strategy": "no",
            "logging_steps": logging_steps(settings),
            "eval_steps": settings.num_steps + 1,
            "seed": settings.seed,
        },
    }
    recipe = folder / "benchmark.yaml"
    recipe.write_text(yaml.safe_dump(document))
    plan = make_plan(load_recipe(recipe), 1)
    stage = plan.timeline.stages[0]
    args = make_arguments(plan, stage)
    plan.run_folder.mkdir(parents=True)
    model = NullModel()
    if not settings.is_null:
        model = build_planned_model(plan, stage)
    with Requests(plan.run_folder, 0) as requests:
        trainer = ClmTrainer(plan, stage, model, args)
        requests.follow(trainer)
        trainer.spikes.start(None)
        trainer.add_callback(trainer_turns(turns))
        trainer.train()


def flops_of(settings: Settings) -> int:
    """FLOPs of training on one token by PaLM's formula, of the model that the variant trains; no weight is made."""
    from transformers import AutoModelForCausalLM

    from clm.meter import flops_per_token
    from clm.model import load_config

    config = load_config(settings.config)
    with torch.device("meta"):
        if settings.kind == "gpt":
            from benchmarks.gpt_block import make_gpt

            model = make_gpt(settings.config, settings.block_size)
        else:
            model = AutoModelForCausalLM.from_config(config)
    return flops_per_token(model, config, settings.block_size)


def logging_steps(settings: Settings) -> int:
    """Each step where losses are compared."""
    return 1 if settings.logs_losses else LOGGING_STEPS


class NullModel(torch.nn.Module):
    """One parameter, no work."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig

        self.weight = torch.nn.Parameter(torch.ones(()))
        self.config, self.generation_config = LlamaConfig(), None

    def num_parameters(self, exclude_embeddings: bool = False) -> int:
        """As transformers' models say it."""
        return 1

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        """A loss that depends on nothing."""
        from transformers.modeling_outputs import CausalLMOutputWithPast

        return CausalLMOutputWithPast(loss=self.weight * 1.0)


def our_batches(settings: Settings) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows, T) inputs and targets of the micro-batches that ours trains on, in its order."""
    from fractions import Fraction

    from clm.order import Order, OrderSource, OrderStage
    from data_prep.blocks import Blocks

    blocks = Blocks(settings.dataset, "train")
    order = Order([OrderSource(blocks.num_blocks)], [OrderStage(None, (Fraction(1),))], settings.seed)
    per_micro_batch = settings.rows * settings.block_size // blocks.block_size
    for first in range(0, settings.num_steps * settings.accumulation * per_micro_batch, per_micro_batch):
        _, numbers = order.block_at(np.arange(first, first + per_micro_batch))
        rows = blocks.read(numbers)
        yield tuple(part.reshape(-1, settings.block_size) for part in (rows[:, :-1], rows[:, 1:]))


def hf_model(settings: Settings, attention: str = "sdpa") -> Any:
    """The model with ours's first weights."""
    from transformers import AutoModelForCausalLM

    from clm.model import draw_weights, load_config

    config = load_config(settings.config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    draw_weights(model, settings.seed, False)
    return model


def run_bare(settings: Settings, turns: Turns) -> None:
    """A loop as one writes it for this model alone."""
    from clm.attention import MASK_FREE, register_mask_free
    from clm.mixed_precision import use_autocast_experts

    register_mask_free()
    if settings.is_null:
        model = NullModel()
    elif settings.kind == "gpt":
        from benchmarks.gpt_block import make_gpt

        model = make_gpt(settings.config, settings.block_size).to(settings.device)
        body, head = model, model.head
    elif settings.kind == "litgpt":
        from benchmarks.litgpt_model import make_litgpt

        model = make_litgpt(settings.config, settings.block_size).to(settings.device)
        body, head = model, torch.nn.Identity()  # it returns logits
    else:
        whole = hf_model(settings, MASK_FREE).to(settings.device).train()
        use_autocast_experts(whole)
        model, head = whole, whole.lm_head

        def body(ids: torch.Tensor) -> torch.Tensor:
            return whole.model(input_ids=ids, use_cache=False).last_hidden_state

    def loss_of(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = head(body(ids)).flatten(0, 1).float()
        return torch.nn.functional.cross_entropy(logits, targets.flatten()) / settings.accumulation

    def null_loss(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return model(ids).loss / settings.accumulation

    loss_of = null_loss if settings.is_null else loss_of
    step_of = torch.compile(loss_of, dynamic=False) if settings.is_compiled else loss_of
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0, fused=True)
    cast = torch.autocast(settings.device.type, torch.bfloat16) if settings.bf16 else nullcontext()
    batches = our_batches(settings)
    while turns.before_step():
        total = 0.0
        for _ in range(settings.accumulation):
            ids, targets = (to_device(part, settings.device) for part in next(batches))
            with cast:
                loss = step_of(ids, targets)
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turns.after_step(total)


def to_device(part: np.ndarray, device: torch.device) -> torch.Tensor:
    """int64, from pinned memory, without waiting."""
    tensor = torch.from_numpy(np.ascontiguousarray(part))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def run_stock(settings: Settings, turns: Turns) -> None:
    """transformers' Trainer with its defaults."""
    import transformers
    from transformers import Trainer, TrainingArguments, default_data_collator

    transformers.logging.set_verbosity_error()
    is_parity = settings.kind == "parity"
    data: list[dict[str, Any]] = []
    for inputs, targets in our_batches(settings):
        for row, following in zip(inputs.tolist(), targets.tolist(), strict=True):
            if is_parity:
                data.append({"input_ids": row, "labels": row, "shift_labels": following})
            else:  # what group_texts of run_clm.py leaves
                data.append({"input_ids": row, "attention_mask": [1] * len(row), "labels": list(row)})
    more = {"use_liger_kernel": True} if settings.variant == "stock_liger" else {}
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="benchmark-"),
        per_device_train_batch_size=settings.rows,
        gradient_accumulation_steps=settings.accumulation,
        max_steps=settings.num_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        logging_steps=logging_steps(settings),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=settings.bf16,
        use_cpu=settings.use_cpu,
        seed=settings.seed,
        torch_compile=settings.is_compiled,
        train_sampling_strategy="sequential",  # data lies in the order of ours
        remove_unused_columns=not is_parity,  # shift_labels, which the model takes among its further arguments
        **more,
    )
    model = NullModel() if settings.is_null else hf_model(settings)
    trainer = Trainer(model, args, default_data_collator, data, callbacks=[trainer_turns(turns)])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()


RUNNERS = {
    "ours": run_ours,
    "bare": run_bare,
    "gpt": run_bare,
    "litgpt": run_bare,
    "stock": run_stock,
    "parity": run_stock,
}


def main() -> None:
    settings = Settings(**json.loads(sys.argv[1]))
    turns = Turns(settings.device)
    RUNNERS[settings.kind](settings, turns)
    os._exit(0)


if __name__ == "__main__":
    main()
