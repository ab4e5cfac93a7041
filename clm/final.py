"""The end of a run: final/, the trained model in Hub format, and with run.ema final-ema/, that of the average.

In: a trainer after its last step. Out: runs/<name>/final with weights, config, generation config, tokenizer and card.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from clm.card import write_card
from clm.checkpoint import check_saved_weights, explain_failure, flush_files, flush_folder, trash
from clm.schedule_free import evaluation_weights

if TYPE_CHECKING:
    from clm.trainer import ClmTrainer


def write_final(trainer: ClmTrainer) -> Path:
    """Write final/, complete or not at all, and last of all; then the checkpoints may be reduced. A collective.

    Raises:
        UserError: the disk is full; the run's last checkpoint is there, and the same command writes final/ again.
    """
    run = trainer.run_folder
    if trainer.ema is not None:
        with trainer.ema.in_place():
            _write_model(trainer, run / "final-ema", is_ema=True)
    with evaluation_weights(trainer.optimizer):
        final = _write_model(trainer, run / "final")
    trainer.saver.clean_up(trainer.state.global_step, is_finished=True)
    trainer.accelerator.wait_for_everyone()
    return final


def _write_model(trainer: ClmTrainer, final: Path, is_ema: bool = False) -> Path:
    run, temporary = trainer.run_folder, final.with_name(f".final-new-{final.name}")
    try:
        trainer.save_model(str(temporary), _internal_call=True)
        trainer.accelerator.wait_for_everyone()
        if trainer.saver.is_publisher:
            (temporary / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
            check_saved_weights(temporary, trainer.plan.num_parameters)
            write_card(run, temporary, is_ema)
            flush_files(temporary)
            if final.exists():  # of a start that was killed between the two
                trash(final)
            os.rename(temporary, final)
            flush_folder(run)
    except Exception as error:
        raise explain_failure(error, final, trainer.plan.weights_bytes) from error
    return final
