"""Blocks become micro-batches exactly: every position has its next token as target, no padding, no second shift."""

import resource
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

from clm.dataset import FILLER, PermutedTargets, TrainBlocks, ValidationRows, as_batch, as_inputs, collate
from clm.order import Order, OrderSource, OrderStage
from data_prep.blocks import Blocks


@pytest.fixture
def train(prepared) -> Blocks:
    return Blocks(prepared.folder, "train")


def dataset(train: Blocks, block_size: int, shuffle: bool = True) -> TrainBlocks:
    order = Order([OrderSource(train.num_blocks)], [OrderStage(None, (Fraction(1),))], 1, shuffle)
    return TrainBlocks([train], order, block_size, train.num_blocks)


@pytest.mark.parametrize("block_size", [64, 32, 16])
def test_rows_in_written_order_are_the_token_stream_and_targets_the_stream_one_later(train, block_size):
    stream = train.shard_tokens(0).astype(np.int64)
    inputs, targets = dataset(train, block_size, shuffle=False).__getitems__(list(range(train.num_blocks))).split()
    assert inputs.shape == (train.num_tokens // block_size, block_size)
    assert np.array_equal(inputs.reshape(-1), stream)
    assert np.array_equal(targets.reshape(-1)[:-1], stream[1:]), "the last position of each row is trained"
    assert targets.reshape(-1)[-1] == -100, "only the last token of the shard has no next one"


def test_a_pass_in_shuffled_order_has_every_token_once(train):
    inputs, _ = dataset(train, 32).__getitems__(list(range(train.num_blocks))).split()
    stream = train.shard_tokens(0).reshape(-1, 32)
    assert sorted(map(bytes, inputs.astype(np.uint16))) == sorted(map(bytes, stream))
    assert not np.array_equal(inputs, stream)


def test_a_batch_gives_the_loss_by_hand_and_is_shifted_once(train):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=384,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            initializer_range=0.3,
        )
    )
    batch = collate(dataset(train, 32, shuffle=False).__getitems__([train.num_blocks - 2, train.num_blocks - 1]))
    logits = model(batch["input_ids"]).logits.detach().double().numpy()
    nll, count = 0.0, 0
    stream = train.shard_tokens(0)[-128:]
    for row in range(4):
        for t in range(32):
            position = row * 32 + t
            if position == 127:
                continue
            z = logits[row, t]
            nll += np.log(np.exp(z - z.max()).sum()) + z.max() - z[stream[position + 1]]
            count += 1
    assert model(**batch).loss.item() == pytest.approx(nll / count, abs=1e-5)
    assert count == 127


def test_samples_of_two_datasets_come_from_the_right_one(train):
    order = Order([OrderSource(train.num_blocks)] * 2, [OrderStage(None, (Fraction(1, 2),) * 2)], 1)
    both = TrainBlocks([train, train], order, 64, 100)
    which, block = order.block_at(np.arange(40))
    rows = both.__getitems__(list(range(40)))
    assert rows.samples == list(range(40)) and set(which) == {0, 1}
    assert rows.targets is None and np.array_equal(rows.tokens, train.read(block))


@pytest.mark.parametrize("block_size", [64, 16])
def test_tokens_that_are_sent_once_become_the_same_inputs_and_targets(train, block_size):
    rows = dataset(train, block_size).__getitems__(list(range(train.num_blocks)))
    sent = collate(rows, with_labels=False, with_samples=True)
    assert sent.keys() == {"tokens", "samples"} and sent["tokens"].shape == (train.num_blocks, 65)
    both, made = collate(rows, with_samples=True), as_inputs(sent, block_size)
    assert made.keys() == both.keys() - {"labels"}
    assert all(torch.equal(made[name], both[name]) and made[name].is_contiguous() for name in made)
    assert (made["shift_labels"] == -100).sum() == 1


def test_a_filler_among_the_samples_has_no_target_and_the_others_keep_theirs(train):
    samples = [3, FILLER, 4, FILLER]
    batch = collate(dataset(train, 64).__getitems__(samples), with_labels=False)
    alone = collate(dataset(train, 64).__getitems__([3, 4]))
    assert torch.equal(batch["input_ids"][::2], alone["input_ids"])
    assert torch.equal(batch["shift_labels"][::2], alone["shift_labels"])
    assert (batch["shift_labels"][1::2] == -100).all()
    none = collate(dataset(train, 64).__getitems__([FILLER, FILLER]), with_labels=False)
    assert (none["shift_labels"] == -100).all() and none["input_ids"].shape == (2, 64)


def test_permuted_targets_are_the_corpus_in_another_order(train):
    targets = PermutedTargets(train, 5).targets(np.arange(train.num_blocks)).reshape(-1)
    stream = train.shard_tokens(0)
    assert np.array_equal(np.bincount(targets, minlength=384), np.bincount(stream, minlength=384))
    assert np.mean(targets[:-1] == stream[1:]) < 0.1


@pytest.mark.parametrize("count", [1, 3, 8, 100])
def test_validation_rows_are_a_prefix_and_what_lies_beyond_has_no_target(prepared, count):
    blocks = Blocks(prepared.folder, "validation")
    rows = ValidationRows("v", blocks, 16, max_tokens=16 * 21)
    assert rows.num_rows == 21
    read = [rows.read(first, count) for first in range(0, 21, count)]
    inputs = np.concatenate([r[0] for r in read])[:21]
    targets = np.concatenate([r[1] for r in read])
    stream = blocks.shard_tokens(0)
    assert np.array_equal(inputs.reshape(-1), stream[: 16 * 21])
    assert np.array_equal(targets[:21].reshape(-1), stream[1 : 16 * 21 + 1])
    assert (targets[21:] == -100).all()


def test_labels_are_the_inputs_themselves_not_a_copy():
    batch = as_batch(np.zeros((1, 4), dtype=np.int64), np.zeros((1, 4), dtype=np.int64))
    assert batch["labels"] is batch["input_ids"]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_micro_batches_take_no_page_faults_once_freed_memory_is_kept(train):
    from clm.host_memory import keep_freed_memory

    keep_freed_memory()
    blocks = np.arange(4096) % train.num_blocks  # 2 MB each of inputs and targets

    def faults(times: int) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(times):
            train.read_rows(blocks)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults(5)
    assert faults(20) < 20 * 100, "two arrays of 512 pages each were allocated 20 times"
