"""A training on the plain transformers Trainer, as transformers' own example run_clm.py sets it up.

    python train_stock.py '{"output_dir": "...", "dataset": "...", "config": "...", "max_steps": 12, ...}'

Blocks, collator, model from a config, `trainer.train(resume_from_checkpoint=True)` where a checkpoint-<step> exists,
`trainer.save_model()`. Nothing of Trainer is replaced. Beside the model it leaves log.jsonl (what was logged) and
batches-<rank>.jsonl (the global step and a hash of each row of each forward), both only for the comparison.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
import transformers
from datasets import load_from_disk
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint


class WriteLog(TrainerCallback):
    """What Trainer logs, one line each."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and "loss" in logs:
            with open(Path(args.output_dir) / "log.jsonl", "a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def main() -> None:
    """Train as the settings say: TrainingArguments, and where dataset and config lie."""
    settings = json.loads(sys.argv[1])
    dataset, config = Path(settings.pop("dataset")), settings.pop("config")
    transformers.logging.set_verbosity_error()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        settings["use_cpu"] = True
    args = TrainingArguments(
        report_to=[], disable_tqdm=True, dataloader_pin_memory=False, ddp_find_unused_parameters=False, **settings
    )
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(dataset / "tokenizer")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config), dtype=torch.float32)
    # each prepared block of 64 tokens is two rows of 32, as in the recipe that it is compared with
    blocks = load_from_disk(str(dataset / "train"))
    rows = torch.tensor(blocks["input_ids"][:]).reshape(-1, 32)
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[WriteLog()],
    )

    def note(module, arguments, named):
        rows = [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16] for row in named["input_ids"]]
        with open(Path(args.output_dir) / f"batches-{args.process_index}.jsonl", "a") as file:
            file.write(json.dumps({"step": trainer.state.global_step + 1, "rows": rows}) + "\n")

    model.register_forward_pre_hook(note, with_kwargs=True)
    has_checkpoint = Path(args.output_dir).is_dir() and get_last_checkpoint(args.output_dir) is not None
    trainer.train(resume_from_checkpoint=has_checkpoint)
    if trainer.state.global_step >= args.max_steps:
        trainer.save_model(str(Path(args.output_dir) / "final"))


if __name__ == "__main__":
    main()
