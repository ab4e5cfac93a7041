"""The HF Trainer with this project's order, evaluation, checkpoints and meter. Each override says what it replaces.

Everything else is stock: the training loop, the loss, mixed precision, DDP and DeepSpeed.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from clm import checkpoint as ckpt
from clm.dataset import OrderSampler, TrainBlocks, ValidationRows, collate
from clm.evaluate import Sums, evaluate_sets, sum_losses
from clm.metrics import JsonLines, Progress, log
from clm.order import ORDER_VERSION
from clm.plan import Plan
from clm.run_flow import PendingLoss, RunFlow
from data_prep.errors import UserError
from data_prep.token_bytes import token_byte_lengths


class ClmTrainer(Trainer):
    """Trainer for causal language models on prepared blocks.

    Args:
        plan: the resolved run.
        model: fp32 model on the CPU.
        args: TrainingArguments made from the plan.
        pending_loss: of the checkpoint that is resumed.
    """

    def __init__(
        self,
        plan: Plan,
        model: torch.nn.Module,
        args: TrainingArguments,
        pending_loss: PendingLoss | None = None,
    ):
        self.plan = plan
        self.run_folder = plan.run_folder
        self.token_bytes = token_byte_lengths(plan.tokenizer)
        self.metrics_file = JsonLines(self.run_folder / "metrics.jsonl")
        self._is_saving = False
        data = plan.recipe.data
        train = TrainBlocks(
            plan.splits,
            plan.order,
            data.block_size,
            plan.num_steps * plan.samples_per_step,
            plan.seed if data.permute_labels else None,
        )
        as_bar = None if not plan.training.get("disable_tqdm") else False
        self.progress = Progress(plan.tokens_per_step, show=args.process_index == 0, as_bar=as_bar)
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=train,
            eval_dataset=plan.validation or None,
            processing_class=plan.tokenizer,
            callbacks=[self.progress, RunFlow(pending_loss, self)],
        )
        self.remove_callback(PrinterCallback)

    # --- data -------------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> OrderSampler:
        """Replaces the random sampler: sample numbers from the current step on; accelerate deals them out to ranks."""
        return OrderSampler(self, len(self.train_dataset), self.plan.samples_per_step)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Stock, but the loader has its own generator: otherwise iter(loader) draws a seed from the global one after
        the resumed RNG state was loaded, and dropout masks differ from those of the uninterrupted run."""
        loader = super().get_train_dataloader()
        loader.base_dataloader.generator = torch.Generator().manual_seed(self.plan.data_seed)
        return loader

    # --- optimizer --------------------------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Weight decay on matrices only. Stock decides by module type and name patterns, which new layers escape."""
        shapes = {n: getattr(p, "ds_shape", p.shape) for n, p in model.named_parameters()}
        return [name for name, shape in shapes.items() if len(shape) >= 2]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 x parameters x tokens as stock counts it, without its walk over all modules in every micro-step."""
        return 6 * self.plan.num_parameters * inputs["input_ids"].numel()

    # --- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """Replaces stock evaluation, a mean over batches, by sums over tokens (clm/evaluate.py)."""
        model = self.model_wrapped if self.is_deepspeed_enabled or self.args.torch_compile else self.model
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
                self.args.process_index,
                self.args.world_size,
            )

        metrics = evaluate_sets(self.plan.validation, sum_one)
        model.train(was_training)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._after_evaluation(metrics)
        return metrics

    @property
    def eval_batch_rows(self) -> int:
        """Rows per forward in evaluation: per_device_eval_batch_size when the recipe says so, else as in training."""
        training = self.plan.training
        return training.get("per_device_eval_batch_size") or training["per_device_train_batch_size"]

    def _after_evaluation(self, metrics: dict[str, Any]) -> None:
        """On rank 0: say the result, redraw the curve, write samples."""
        if not self.is_world_process_zero():
            return
        bits = metrics["eval_bits_per_byte"]
        log.info(
            "step %s  validation loss %.4f  perplexity %.2f  bits per byte %s  (%s tokens in %.1f s)",
            f"{self.state.global_step:,}",
            metrics["eval_loss"],
            metrics["eval_perplexity"],
            "-" if bits is None else f"{bits:.4f}",
            f"{metrics['eval_num_tokens']:,}",
            metrics["eval_time_s"],
        )
        from clm.curve import draw_curve

        draw_curve(self.run_folder)
        self._write_samples()

    def _write_samples(self) -> None:
        settings = self.plan.recipe.run.samples
        if not settings.prompts or self.is_deepspeed_enabled:
            return
        from clm.sample import generate_samples

        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # sampling must not move the run's RNG
            texts = generate_samples(
                self.model,
                self.processing_class,
                list(settings.prompts),
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_k=settings.top_k,
                seed=self.plan.seed,
            )
        for prompt, text in zip(settings.prompts, texts, strict=True):
            record = {"step": self.state.global_step, "tokens": self.num_tokens, "prompt": prompt, "text": text}
            JsonLines(self.run_folder / "samples.jsonl").write(record)

    # --- logging ----------------------------------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """Tokens trained on so far."""
        return self.state.global_step * self.plan.tokens_per_step

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Stock, plus tokens and speed, metrics.jsonl, and a stop where the loss is no number any more."""
        # stock's epoch restarts at a resume; passes over the most used dataset do not
        self.state.epoch = max(self.plan.order.passes(self.state.global_step * self.plan.samples_per_step))
        is_training_point, is_evaluation = "loss" in logs, "eval_loss" in logs
        if not (is_training_point or is_evaluation):
            return  # train_runtime and its like: metrics.jsonl has them exactly
        logs = {**logs, "tokens": self.num_tokens}
        if is_training_point:
            logs["tokens_per_s"] = self.progress.take_tokens_per_s()
        logs["time_s"] = self.progress.seconds
        super().log(dict(logs), start_time)
        if not self.is_world_process_zero():
            return
        record = {"step": self.state.global_step, "tokens": logs.pop("tokens"), **logs}
        self.metrics_file.write(record)
        if is_training_point:
            self.progress.report(record, self.state.max_steps)
            if not math.isfinite(record["loss"]):
                raise UserError(
                    f"{self.run_folder}: the loss is {record['loss']} at step {record['step']:,}. Training on would "
                    "save broken weights. Lower training.learning_rate or lengthen training.warmup_steps, and give the "
                    "run another training.run_name; checkpoints up to here are kept."
                )

    def restore_pending_loss(self, pending: PendingLoss) -> None:
        """Go on with the mean that was being built: stock forgets it, and the first logged loss covers fewer steps."""
        self._tr_loss += pending["summed_loss"]
        self._globalstep_last_logged = pending["since_step"]

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        """Stock, but a checkpoint in the making lies in a folder that nothing takes for a checkpoint."""
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, ckpt.SAVING) if self._is_saving else folder

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Replaces stock's writing in place: write beside, checksum, flush, rename, then rotate by step number."""
        name = f"{ckpt.PREFIX}{self.state.global_step}"
        temporary = self.run_folder / ckpt.SAVING / name
        self.accelerator.wait_for_everyone()
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
            facts = self._checkpoint_facts()
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                (temporary / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
                ckpt.publish_checkpoint(temporary, facts)
                ckpt.rotate_checkpoints(self.run_folder, self.args.save_total_limit)
        except Exception as error:
            shutil.rmtree(temporary.parent, ignore_errors=True)
            ckpt.raise_if_disk_full(error, temporary, self.plan.checkpoint_bytes)
            raise
        finally:
            self._is_saving = False
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and self.is_world_process_zero():
            self._push_checkpoint(self.run_folder / name)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Stock, but below ZeRO stage 3 the whole model lies on each rank and is saved as it is: stock clones every
        tensor there, after which tied weights are no longer recognised as one and are written twice."""
        stage = self.accelerator.deepspeed_plugin.zero_stage if self.is_deepspeed_enabled else None
        if stage is None or stage == 3:
            super().save_model(output_dir, _internal_call=_internal_call)
        else:
            self._save(output_dir)

    def _checkpoint_facts(self) -> dict[str, Any]:
        summed_loss = self.accelerator.gather(self._tr_loss).mean().item()
        return {
            "step": self.state.global_step,
            "tokens": self.num_tokens,
            "time_s": self.progress.seconds,
            "order_version": ORDER_VERSION,
            "num_processes": self.args.world_size,
            "pending_loss": PendingLoss(since_step=self._globalstep_last_logged, summed_loss=summed_loss),
            "datasets": {item.dataset: s.manifest.fingerprint for item, s in self._mixture()},
        }

    def _mixture(self) -> list[tuple[Any, Any]]:
        return list(zip(self.plan.recipe.data.mixture, self.plan.splits, strict=True))

    def save_final(self) -> Path:
        """Write final/ in Hub format: weights, config, generation config, tokenizer, model card; complete or absent."""
        final, temporary = self.run_folder / "final", self.run_folder / ".final-new"
        try:
            self.save_model(str(temporary), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                (temporary / "training_args.bin").unlink(missing_ok=True)
                ckpt.check_saved_weights(temporary, self.plan.num_parameters)
                from clm.card import write_card

                write_card(self.run_folder, temporary)
                ckpt.flush_files(temporary)
                os.rename(temporary, final)
                ckpt.flush_folder(self.run_folder)
        except Exception as error:
            ckpt.raise_if_disk_full(error, temporary, self.plan.checkpoint_bytes)
            raise
        self.accelerator.wait_for_everyone()
        return final

    # --- Hub --------------------------------------------------------------------------------------------------------

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Stock makes the repository when training begins; here what is in the way is said in one sentence."""
        from clm.push import create_repository

        if self.is_world_process_zero():
            repo_id = self.args.hub_model_id or self.plan.recipe.name
            self.hub_model_id = create_repository(repo_id, self.args.hub_private_repo if private is None else private)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Stock pushes from the folder in the making; `_push_checkpoint` pushes the finished one."""

    def _push_checkpoint(self, folder: Path) -> None:
        """Push a finished checkpoint as hub_strategy says. A failing push is reported and never ends the training."""
        from clm.push import push_folder

        strategy = str(getattr(self.args.hub_strategy, "value", self.args.hub_strategy))
        where = {"every_save": None, "checkpoint": "last-checkpoint", "all_checkpoints": folder.name}
        if strategy not in where:
            return  # "end": only final/ is pushed
        only_weights = ["optimizer*", "scheduler*", "rng_state*", "trainer_state.json", ckpt.MANIFEST, "global_step*/*"]
        try:
            push_folder(
                folder,
                self.hub_model_id,
                private=self.args.hub_private_repo,
                revision=self.args.hub_revision,
                commit_message=f"Step {self.state.global_step}, {self.num_tokens} tokens",
                path_in_repo=where[strategy],
                ignore_patterns=only_weights if strategy == "every_save" else None,
            )
        except UserError as error:
            log.warning("The push of %s failed, training goes on: %s", folder, error)

    def push_final(self, final: Path) -> None:
        """Push final/ where the recipe asks for it; the model is safe on the disk whatever happens here."""
        from clm.push import push_folder

        if not self.args.push_to_hub or not self.is_world_process_zero():
            return
        try:
            url = push_folder(
                final, self.hub_model_id, private=self.args.hub_private_repo, revision=self.args.hub_revision
            )
            log.info("pushed to %s", url)
        except UserError as error:
            log.warning("The push failed: %s\nPush it later: make push RUN=%s", error, self.plan.recipe.name)
