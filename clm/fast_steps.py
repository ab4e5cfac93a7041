"""What `run.speed: fast` does otherwise than transformers' Trainer between two log points.

In: a Trainer's calls. Out: the same losses, gradients and updates, with less around them. With `run.speed: stock` every
method here is Trainer's own. Each override names what it replaces (lines of transformers 5.23, trainer.py) and is
compared with it in tests/end_to_end/test_speed.py.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.training_args import OptimizerNames

from clm.dataset import as_inputs, collate, collate_as_stock
from clm.host_memory import keep_freed_memory
from clm.meter import make_meter
from clm.muon import make_optimizer
from data_prep.blocks import NO_TARGET
from data_prep.paths import cache_dir

if TYPE_CHECKING:
    from clm.plan import Plan
    from clm.timeline import Stage


class FastSteps(Trainer):
    """Trainer with the fast steps of a plan; a mix-in below ClmTrainer, which sets `plan` and `stage` first."""

    plan: Plan
    stage: Stage

    def __init__(self, **kwargs: Any):
        args, speed = kwargs["args"], self.plan.speed
        # of the present micro-batch, where more than the cross entropy is trained on: it, router_loss and z_loss
        self._apart: dict[str, torch.Tensor] = {}
        self._parts: dict[str, list[torch.Tensor]] = {}  # the latter of the micro-batches since the last log point
        self._options = {"with_z_loss": True} if self.plan.recipe.run.z_loss else {}
        if args.torch_compile and speed.is_fast:
            # One graph for each shape: with Trainer's default the second shape, which evaluation or a stage brings,
            # makes torch.compile compile the training step anew with symbolic sizes, which are slower.
            os.environ.setdefault("ACCELERATE_DYNAMO_USE_DYNAMIC", "false")
            keep_compiled_kernels()
        if speed.is_fast:
            keep_freed_memory()
        super().__init__(**kwargs)
        self.meter = make_meter(self.plan, self.stage, self.model, args)
        self.add_callback(self.meter)
        if speed.is_fast:
            self.quiet = QuietCollector()
            self.add_callback(self.quiet)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Stock; the garbage collector is given back however the training ends."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.plan.speed.is_fast:
                self.quiet.thaw()

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Stock (trainer.py, get_batch_samples) counts targets where a batch has `labels`; ours needs none of them, and
        makes inputs and targets here, of tokens that were sent to the device once. The meter notes how long the loader
        was waited for."""
        began_at = time.perf_counter()
        try:
            return self._take_batches(epoch_iterator, num_batches, device)
        finally:
            self.meter.wait_s += time.perf_counter() - began_at

    def _take_batches(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        if self.plan.speed.loss is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        taken = zip(range(num_batches), epoch_iterator, strict=False)
        batches = [as_inputs(batch, self.stage.block_size) for _, batch in taken]
        if not batches:
            return batches, None
        num_items = sum((batch["shift_labels"] != NO_TARGET).sum() for batch in batches)
        if self.plan.num_data_processes > 1:
            num_items = self.accelerator.gather(num_items).sum() // self.plan.tp_size
        return batches, num_items

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Stock (trainer.py, training_step) walks over all modules to set the training mode, and over the batch to move
        it, in every micro-batch; both are as they should be. With a router loss or a z-loss, the cross entropy alone is
        returned, which is what Trainer logs as `loss`."""
        if self.plan.speed.loss is None or self._needs_stock_step:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            if not model.training:
                model.train()
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            self.accelerator.backward(loss)
            loss = loss.detach()
        if not self._apart:
            return loss
        for name in self._apart.keys() - {"cross_entropy"}:
            self._parts.setdefault(name, []).append(self._apart[name])
        return self._apart["cross_entropy"]

    @property
    def _needs_stock_step(self) -> bool:
        """Stock's step has more for few: DeepSpeed's scaling, emptying the GPU's cache, optimizers that want a rate."""
        args = self.args
        is_lomo = args.optim in (OptimizerNames.LOMO, OptimizerNames.ADALOMO)
        return self.is_deepspeed_enabled or args.torch_empty_cache_steps is not None or is_lomo

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Stock (trainer.py, compute_loss) gives the number of targets to the model; here the model sums, and the
        division comes after it, so that training and evaluation call the same function. The router loss of a mixture of
        experts, which stock adds whole in each micro-batch (transformers/models/mixtral/modeling_mixtral.py), is
        divided by their number: the step's is the mean over its micro-batches."""
        if self.plan.speed.loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        def share_of_step(summed: torch.Tensor) -> torch.Tensor:
            share = summed / num_items_in_batch
            num_means = self.plan.num_data_processes
            return share * num_means if num_means > 1 else share  # DDP takes the mean

        outputs = model(**inputs, num_items_in_batch=1, **self._options)
        loss = share_of_step(outputs.loss)
        router_loss, z_loss = (getattr(outputs, name, None) for name in ("aux_loss", "z_loss"))
        if router_loss is not None or z_loss is not None:
            self._apart = {"cross_entropy": loss.detach()}
        if z_loss is not None:
            self._apart = {"cross_entropy": share_of_step(outputs.cross_entropy), "z_loss": share_of_step(z_loss)}
        if router_loss is not None:
            self._apart["router_loss"] = router_loss.detach()
            loss = loss + self.model.config.router_aux_loss_coef * router_loss / self._num_micro_batches
        return (loss, outputs) if return_outputs else loss

    @property
    def _num_micro_batches(self) -> int:
        """Of one device between two optimizer steps."""
        return getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Stock (trainer.py, create_optimizer) has no Muon: `run.optimizer: muon` makes it, with AdamW's arguments as
        stock reads them from `training`."""
        run, args = self.plan.recipe.run, self.args
        if run.optimizer != "muon":
            return super().create_optimizer(model)
        if self.optimizer is None:
            _, adamw = self.get_optimizer_cls_and_kwargs(args, self.model)
            muon = dataclasses.asdict(run.muon)
            if muon["weight_decay"] is None:
                muon["weight_decay"] = args.weight_decay
            self.optimizer = make_optimizer(self.model if model is None else model, adamw, args.weight_decay, muon)
        return self.optimizer

    def take_parts(self) -> dict[str, float]:
        """What is trained on beside the cross entropy, since the last call: the mean `router_loss` of a micro-batch,
        without its coefficient, and the mean `z_loss` of a step, with it; {} without either.

        A collective that waits for the device: for log points."""
        means = {name: torch.stack(values).mean() for name, values in sorted(self._parts.items())}
        self._parts = {}
        if "z_loss" in means:
            means["z_loss"] = means["z_loss"] * self._num_micro_batches  # each has its share of the step's
        return {name: self.accelerator.gather(mean).mean().item() for name, mean in means.items()}


def keep_compiled_kernels() -> None:
    """Have torch.compile keep its kernels with this project's other caches, for the next start of a run.

    torch's default lies in /tmp, which a reboot empties and a cluster does not share. Importing torch._dynamo writes
    that default into the environment, so there it is no wish of the user's.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) == default_cache_dir():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_dir() / "inductor")


def make_collator(plan: Plan) -> Callable[..., dict[str, Any]]:
    """What makes a micro-batch: clm.dataset.collate, or with `run.speed: stock` transformers' default_data_collator."""
    collator = partial(collate, with_labels=plan.speed.loss is None) if plan.speed.is_fast else collate_as_stock
    return partial(collator, mask=plan.document_mask, with_samples=plan.recipe.run.record_blocks)


class QuietCollector(TrainerCallback):
    """Python's garbage collector looks at what is new only, and when the run waits anyway.

    The objects of torch, the model and the loop live until the end; looking through them takes tens of milliseconds, at
    any moment, while the GPU runs dry. After the first step they are there, and after an evaluation some more: a graph
    that it compiled, the libraries that it loaded.
    """

    def __init__(self) -> None:
        self.is_frozen = False
        self.has_evaluated = False  # since the last freeze

    def on_step_end(self, args, state, control, **kwargs):
        is_point = control.should_log or control.should_evaluate or control.should_save
        if not self.is_frozen or (is_point and self.has_evaluated):
            gc.unfreeze()
            gc.collect()
            gc.freeze()
            gc.disable()
            self.is_frozen, self.has_evaluated = True, False
        elif is_point:
            gc.collect()

    def on_evaluate(self, args, state, control, **kwargs):
        self.has_evaluated = True

    def on_train_end(self, args, state, control, **kwargs):
        self.thaw()

    def thaw(self) -> None:
        """Give the collector back as it was."""
        if self.is_frozen:
            gc.unfreeze()
            gc.enable()
            self.is_frozen = False
