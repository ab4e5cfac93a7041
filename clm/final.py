"""The end of a run: final/, the trained model in Hub format.

In: a trainer after its last step. Out: runs/<name>/final with weights, config, generation config, tokenizer and card.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from clm.card import write_card
from clm.checkpoint import check_saved_weights, explain_failure, flush_files, flush_folder
from clm.plan import BYTES_PER_PARAMETER

if TYPE_CHECKING:
    from clm.trainer import ClmTrainer


def write_final(trainer: ClmTrainer) -> Path:
    """Write final/, complete or not at all; then the checkpoints may be reduced. A collective.

    Raises:
        UserError: the disk is full; the run's last checkpoint is there, and the same command writes final/ again.
    """
    run = trainer.run_folder
    final, temporary = run / "final", run / ".final-new"
    try:
        trainer.save_model(str(temporary), _internal_call=True)
        trainer.accelerator.wait_for_everyone()
        if trainer.saver.is_publisher:
            (temporary / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
            check_saved_weights(temporary, trainer.plan.num_parameters)
            write_card(run, temporary)
            flush_files(temporary)
            os.rename(temporary, final)
            flush_folder(run)
    except Exception as error:
        raise explain_failure(error, final, trainer.plan.num_parameters * BYTES_PER_PARAMETER) from error
    trainer.saver.clean_up(trainer.state.global_step, is_finished=True)
    trainer.accelerator.wait_for_everyone()
    return final
