"""Evaluation is exact over tokens: no batch size, padding row or number of sets changes it."""

import math

import numpy as np
import pytest
import torch

from clm.dataset import ValidationRows
from clm.evaluate import Sums, evaluate_sets, sum_losses
from data_prep.blocks import Blocks
from data_prep.token_bytes import token_byte_lengths


@pytest.fixture(scope="module")
def setting(prepared):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(prepared.folder / "tokenizer")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval(), tokenizer, Blocks(prepared.folder, "validation")


def sums(setting, batch_rows: int, rank: int = 0, num_rows: int = 21) -> Sums:
    model, tokenizer, blocks = setting
    rows = ValidationRows("v", blocks, 32, 32 * num_rows)
    return sum_losses(
        lambda batch: model(**batch, num_items_in_batch=1, use_cache=False).loss,
        rows,
        token_byte_lengths(tokenizer),
        batch_rows,
        torch.device("cpu"),
    )


def test_the_sums_are_those_of_a_plain_loop(setting):
    model, tokenizer, blocks = setting
    stream = blocks.shard_tokens(0)[: 32 * 21 + 1].astype(np.int64)
    nll = 0.0
    for first in range(0, 32 * 21, 32):
        logits = model(torch.from_numpy(stream[first : first + 32])[None]).logits[0].detach().double()
        nll -= logits.log_softmax(-1)[torch.arange(32), torch.from_numpy(stream[first + 1 : first + 33])].sum().item()
    text = tokenizer.decode(stream[1:], skip_special_tokens=True)
    found = sums(setting, 8)
    assert found.nll == pytest.approx(nll, rel=1e-6)
    assert found.num_tokens == 32 * 21
    # the first and last token may hold a part of a character, which decode shows as U+FFFD (3 bytes)
    assert abs(found.num_bytes - len(text.encode())) <= 4
    metrics = found.metrics("eval")
    assert metrics["eval_bits_per_byte"] == pytest.approx(nll / math.log(2) / found.num_bytes, rel=1e-6)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(nll / 672), rel=1e-5)


@pytest.mark.parametrize("batch_rows", [1, 3, 8, 64])
def test_the_batch_size_does_not_matter(setting, batch_rows):
    reference = sums(setting, 21)
    found = sums(setting, batch_rows)
    assert (found.num_tokens, found.num_bytes) == (reference.num_tokens, reference.num_bytes)
    assert found.nll == pytest.approx(reference.nll, rel=1e-6)


def test_sets_are_added_by_tokens_not_averaged():
    one, two = Sums(10.0, 5, 20), Sums(90.0, 15, 60)

    class Rows:
        def __init__(self, name):
            self.name = name

    metrics = evaluate_sets([Rows("a"), Rows("b")], lambda rows: one if rows.name == "a" else two)
    assert metrics["eval_loss"] == 100 / 20
    assert (metrics["eval_a_loss"], metrics["eval_b_loss"]) == (2.0, 6.0)
    assert metrics["eval_bits_per_byte"] == pytest.approx(100 / math.log(2) / 80)
