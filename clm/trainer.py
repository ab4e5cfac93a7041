"""The HF Trainer with this project's order, evaluation, checkpoints and meter. Each override says what it replaces.

Everything else is stock: the training loop, mixed precision, DDP and DeepSpeed; clm/fast_steps.py has what is faster.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

from clm.block_record import BlockRecord
from clm.checkpoint import SAVING
from clm.dataset import OrderSampler, TrainBlocks, ValidationRows
from clm.divided import is_divided
from clm.ema import PREFIX as EMA_PREFIX
from clm.ema import Ema
from clm.evaluate import Sums, evaluate_sets, sum_losses
from clm.fast_steps import FastSteps, make_collator
from clm.first_weights import fill_from_files, names_match
from clm.fsdp import gather_state, shard
from clm.loading import is_ours, load_optimizer_and_scheduler, load_weights
from clm.metrics import JsonLines, Progress
from clm.plan import Plan
from clm.run_flow import PendingLoss, RunFlow
from clm.saving import Saver
from clm.schedule_free import evaluation_weights, load_training_weights
from clm.show_evaluation import show_evaluation
from clm.signals import shield_workers
from clm.spikes import SpikeWatch
from clm.timeline import Stage
from clm.universal import mend_optimizer, prepare_engine
from data_prep.errors import UserError
from data_prep.token_bytes import token_byte_lengths


class ClmTrainer(FastSteps):
    """Trainer for causal language models on prepared blocks.

    Args:
        plan: the resolved run.
        stage: the stage to train; training ends at its last step.
        model: fp32 model on the CPU.
        args: TrainingArguments made from the plan.
        pending_loss: of the checkpoint that is resumed.
    """

    def __init__(
        self,
        plan: Plan,
        stage: Stage,
        model: torch.nn.Module,
        args: TrainingArguments,
        pending_loss: PendingLoss | None = None,
    ):
        self.plan = plan
        self.stage = stage
        self.is_divided = is_divided()  # its parameters are DTensors
        self._flops_per_token: int | None = None
        self.outcome = "finished"  # why training ended: finished, border (of a stage), stopped or rollback
        self.run_folder = plan.run_folder
        self.token_bytes = token_byte_lengths(plan.tokenizer)
        self.metrics_file = JsonLines(self.run_folder / "metrics.jsonl")
        self._evaluated: dict[int, float] = {}  # step -> validation loss, of the newest evaluation
        data = plan.recipe.data
        train = TrainBlocks(
            plan.splits,
            plan.order,
            stage.block_size,
            plan.num_steps * plan.slots_per_step(stage),
            plan.seed if data.permute_labels else None,
        )
        as_bar = None if not plan.training.get("disable_tqdm") else False
        self.progress = Progress(stage.tokens_per_step, show=args.process_index == 0, as_bar=as_bar)
        super().__init__(
            model=model,
            args=args,
            data_collator=make_collator(plan),
            train_dataset=train,
            eval_dataset=plan.validation or None,
            processing_class=plan.tokenizer,
            callbacks=[self.progress, RunFlow(pending_loss, self)],
        )
        if self.is_divided:
            shard(self)
        self.ema: Ema | None = None
        if plan.recipe.run.ema.decay is not None:
            self.ema = Ema(self.model, plan.recipe.run.ema.decay)
            self.add_callback(self.ema)
        self.spikes = SpikeWatch(self, args.device)
        self.block_record = None
        if plan.recipe.run.record_blocks:
            self.block_record = BlockRecord(self.run_folder, args.process_index, plan.tp_size)
            self.add_callback(self.block_record)
        self.remove_callback(PrinterCallback)
        self.saver = Saver(self)

    def _move_model_to_device(self, model: torch.nn.Module, device: torch.device) -> None:
        """Stock, but a model that will be divided has no memory yet, and one that is divided is there."""
        if not self.is_divided:
            super()._move_model_to_device(model, device)

    # --- data -------------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> OrderSampler:
        """Replaces the random sampler: sample numbers from the current step on; accelerate deals them out to ranks."""
        return OrderSampler(self, self.plan.timeline, self.stage)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Stock, but the loader has its own generator: otherwise iter(loader) draws a seed from the global one after
        the resumed RNG state was loaded, and dropout masks differ from those of the uninterrupted run. And a signal to
        all processes leaves its workers alive, for the run that saves before it stops."""
        loader = super().get_train_dataloader()
        loader.base_dataloader.generator = torch.Generator().manual_seed(self.plan.data_seed)
        shield_workers(loader.base_dataloader)
        return loader

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """Stock, after noting what is consumed where the recipe asks for it; the loss is also told to the watch."""
        if self.block_record is not None:
            self.block_record.note(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.spikes.add_loss(loss)
        return loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Stock, and the norm is told to the watch, before the update that it may take back."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.spikes.grad_norm = norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return norm

    # --- optimizer --------------------------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Weight decay on matrices only. Stock decides by module type and name patterns, which new layers escape."""
        shapes = {n: getattr(p, "ds_shape", p.shape) for n, p in model.named_parameters()}
        return [name for name, shape in shapes.items() if len(shape) >= 2]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Stock's 6 x parameters without embeddings x tokens, without its walk over all modules in every micro-step."""
        if self._flops_per_token is None:
            self._flops_per_token = 6 * self.model.num_parameters(exclude_embeddings=True)
        return self._flops_per_token * inputs["input_ids"].numel()

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Replaces stock's get_scheduler by the plan's one function over all stages, which equals it without stages."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer if optimizer is None else optimizer, self.plan.learning_rate_factor()
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Stock, but a checkpoint of FSDP2 is read in any layout, and FSDP2 reads any (clm/loading.py). Stock leaves
        out weights that the files name otherwise, without a word: a mixture's experts would begin anew. And what goes
        with run.ema and schedule-free optimizers."""
        if is_ours(self, resume_from_checkpoint):
            load_weights(self, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            if not names_match(self.model, resume_from_checkpoint):
                fill_from_files(self.model, resume_from_checkpoint)
        load_training_weights(self.model, Path(resume_from_checkpoint))
        if self.ema is not None:
            self.ema.load(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Stock, but the learning rate is that of the present schedule: stock goes on for one step with the saved one,
        which differs where the run was extended or forked."""
        if checkpoint is not None and is_ours(self, checkpoint):
            load_optimizer_and_scheduler(self, checkpoint)
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.is_deepspeed_enabled:
            mend_optimizer(self, Path(checkpoint))
        if checkpoint is not None and isinstance(self.lr_scheduler, torch.optim.lr_scheduler.LambdaLR):
            scheduler = self.lr_scheduler
            factor = scheduler.lr_lambdas[0](scheduler.last_epoch)
            scheduler._last_lr = [base * factor for base in scheduler.base_lrs]
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
                if torch.is_tensor(group["lr"]):  # torchao's, which a compiled update reads
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    # --- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """Replaces stock evaluation, a mean over batches, by sums over tokens (clm/evaluate.py)."""
        with evaluation_weights(self.optimizer):
            return self._evaluate_now()

    def _evaluate_now(self) -> dict[str, Any]:
        model = self.called_model
        was_training = model.training
        model.eval()
        plain_loss = {"use_cache": False}
        if hasattr(self.model.config, "output_router_logits"):
            plain_loss["output_router_logits"] = False  # the router's loss is no part of the cross entropy

        def summed_loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return model(**batch, num_items_in_batch=1, **plain_loss).loss

        def sum_one(rows: ValidationRows) -> Sums:
            return sum_losses(
                summed_loss,
                rows,
                self.token_bytes,
                self.eval_batch_rows,
                self.args.device,
                self.args.process_index // self.plan.tp_size,
                self.plan.num_data_processes,
                self.plan.document_mask,
            )

        metrics = evaluate_sets(self.plan.validation, sum_one)
        if self.ema is not None:
            with self.ema.in_place():
                averaged = evaluate_sets(self.plan.validation, sum_one)
            metrics |= {EMA_PREFIX + name.removeprefix("eval_"): value for name, value in averaged.items()}
        model.train(was_training)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._evaluated = {self.state.global_step: metrics["eval_loss"]}
        show_evaluation(self, metrics)
        return metrics

    @property
    def called_model(self) -> torch.nn.Module:
        """What a forward without gradients goes through: DeepSpeed's engine, the compiled model, or the model."""
        return self.model_wrapped if self.is_deepspeed_enabled or self.args.torch_compile else self.model

    @property
    def eval_batch_rows(self) -> int:
        """Rows per forward in evaluation: per_device_eval_batch_size when the recipe says so, else as in training."""
        training = self.plan.training
        return training.get("per_device_eval_batch_size") or training["per_device_train_batch_size"]

    # --- logging ----------------------------------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """Tokens trained on so far."""
        return self.plan.timeline.tokens_before(self.state.global_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Stock, plus tokens and speed, metrics.jsonl, and a stop where the loss is no number any more."""
        # stock's epoch restarts at a resume; passes over the most used dataset do not
        self.state.epoch = max(self.plan.order.passes(self.plan.timeline.samples_before(self.state.global_step)))
        is_training_point, is_evaluation = "loss" in logs, "eval_loss" in logs
        if not (is_training_point or is_evaluation):
            return  # train_runtime and its like: metrics.jsonl has them exactly
        logs, details = {**logs, "tokens": self.num_tokens}, {}
        if is_training_point:
            details = self.spikes.complete_logs(logs)
            logs |= self.take_parts() | self.meter.take(self.stage.tokens_per_step)
        logs["time_s"] = self.progress.seconds
        super().log(dict(logs), start_time)
        if self.is_world_process_zero():
            record = {"step": self.state.global_step, "tokens": logs.pop("tokens"), **logs, **details}
            self.metrics_file.write(record)
            if is_training_point:
                self.progress.report(record, self.state.max_steps)
        if self.spikes.fatal is not None:
            raise UserError(self.spikes.fatal)

    def write_stage(self) -> None:
        """At a stage's end: which share of it was of which dataset, as the order dealt it, into metrics.jsonl."""
        if not self.is_world_process_zero():
            return
        stage, order, timeline = self.stage, self.plan.order, self.plan.timeline
        before, after = (order.counts_before(timeline.samples_before(k)) for k in (stage.first_step, stage.last_step))
        counts = [b - a for a, b in zip(before, after, strict=True)]
        shares = {n: c / sum(counts) for n, c in zip(self.plan.recipe.data.datasets, counts, strict=True) if c}
        record = {"step": stage.last_step, "tokens": self.num_tokens, "stage": stage.name, "shares": shares}
        self.metrics_file.write({**record, "time_s": self.progress.seconds})

    def restore_pending_loss(self, pending: PendingLoss) -> None:
        """Go on with the mean that was being built: stock forgets it, and the first logged loss covers fewer steps."""
        self._tr_loss += pending["summed_loss"]
        self._globalstep_last_logged = pending["since_step"]

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        """Stock, but what DeepSpeed's engine writes goes where nothing takes it for a checkpoint."""
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, SAVING) if self.saver.is_engine_writing else folder

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Replaces stock's writing in place, while training waits, and its rotation by time (clm/saving.py)."""
        self.saver.save(model, trial)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Stock, and the checkpoint in the making is finished, however the training ends."""
        if resume_from_checkpoint is not None:
            prepare_engine(self, Path(resume_from_checkpoint))
        try:
            result = super().train(resume_from_checkpoint, **kwargs)
        except BaseException:
            self.saver.abandon()
            raise
        self.saver.finish()
        return result

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Stock, but below ZeRO stage 3 the whole model lies on each rank and is saved as it is: stock clones every
        tensor there, after which tied weights are no longer recognised as one and are written twice."""
        stage = self.accelerator.deepspeed_plugin.zero_stage if self.is_deepspeed_enabled else None
        if self.is_divided:  # stock writes nothing of a sharded model
            state = gather_state(self.model, self.saver.is_publisher)
            if state:
                self._save(output_dir, state_dict=state)
        elif stage is None or stage == 3:
            super().save_model(output_dir, _internal_call=_internal_call)
        else:
            self._save(output_dir)

    def save_final(self) -> Path:
        """Write final/ in Hub format, complete or not at all."""
        from clm.final import write_final

        return write_final(self)

    # --- Hub --------------------------------------------------------------------------------------------------------

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Stock makes the repository when training begins; here what is in the way is said in one sentence."""
        from clm.push import create_repository

        if self.is_world_process_zero():
            repo_id = self.args.hub_model_id or self.plan.recipe.name
            self.hub_model_id = create_repository(repo_id, self.args.hub_private_repo if private is None else private)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Stock pushes from the folder in the making; clm/push.py pushes the finished one."""

    def push_final(self, final: Path) -> None:
        """Push final/ where the recipe asks for it; the model is safe on the disk whatever happens here."""
        from clm.push import push_final

        if self.args.push_to_hub and self.is_world_process_zero():
            push_final(self, final)
