import json

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from clm.reload import check_tokenizer, iter_rows, reload_run
from clm.run_folder import read_recipe
from data_prep.blocks import NO_TARGET, Blocks
from data_prep.errors import UserError

BLOCK_SIZE = 32  # a prepared block, of 64, is two rows


def test_final_gives_the_training_loss_again(small_run, capsys):
    assert reload_run(str(small_run)) == 0
    out = capsys.readouterr().out
    assert "validation loss, tiny: " in out and "difference" in out and "reload: the same model" in out


def test_other_weights_are_found(run_copy, capsys):
    model = AutoModelForCausalLM.from_pretrained(run_copy / "final")
    with torch.no_grad():
        model.lm_head.weight += 0.05 * torch.randn(
            model.lm_head.weight.shape, generator=torch.Generator().manual_seed(1)
        )
    model.save_pretrained(run_copy / "final")
    assert reload_run(str(run_copy)) == 1
    assert "NOT the same model" in capsys.readouterr().out


def test_another_tokenizer_is_found(run_copy, prepared, capsys):
    path = run_copy / "final" / "tokenizer.json"
    backend = json.loads(path.read_text())
    assert check_tokenizer(prepared.folder / "tokenizer", prepared.folder) == []
    backend["post_processor"] = None
    path.write_text(json.dumps(backend))
    assert any("ids of a sample text" in line for line in check_tokenizer(run_copy / "final", prepared.folder))
    assert reload_run(str(run_copy)) == 1


def test_rows_are_the_token_stream_and_a_rows_last_target_is_the_next_rows_first_token(prepared):
    stream = Blocks(prepared.folder, "validation").shard_tokens(0).astype(np.int64)
    num_rows = len(stream) // BLOCK_SIZE
    for rows_at_once in (1, 3, 100):  # a prepared block is two rows: 1 and 3 begin in the middle of one
        parts = list(iter_rows(prepared.folder, BLOCK_SIZE, num_rows, rows_at_once))
        inputs, targets = (np.concatenate(arrays).reshape(-1) for arrays in zip(*parts, strict=True))
        assert np.array_equal(inputs, stream)
        assert np.array_equal(targets[:-1], stream[1:]) and targets[-1] == NO_TARGET


def test_a_validation_split_that_has_shrunk_is_an_error_that_says_so(prepared):
    with pytest.raises(UserError, match="10,000 rows were evaluated in training.*prepared again"):
        next(iter_rows(prepared.folder, BLOCK_SIZE, 10_000, 8))


def test_a_run_without_evaluation_or_with_permuted_labels_cannot_be_compared(run_copy):
    recipe = read_recipe(run_copy)
    recipe["data"]["permute_labels"] = True
    (run_copy / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match="permute_labels is true"):
        reload_run(str(run_copy))
    (run_copy / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no evaluation to compare with"):
        reload_run(str(run_copy))
