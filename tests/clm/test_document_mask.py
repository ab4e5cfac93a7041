"""Documents of one row have the loss, gradients and counts that they have one by one."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from tiny import EOS, make_model, make_stream
from transformers import LlamaForCausalLM

from clm.dataset import Rows, TrainBlocks, ValidationRows, as_batch, collate
from clm.document_mask import DocumentMask
from clm.evaluate import sum_losses
from clm.order import Order, OrderSource, OrderStage
from clm.reload import separate_documents
from data_prep.blocks import Blocks
from data_prep.documents import DocumentMap
from data_prep.token_bytes import token_byte_lengths

CPU = torch.device("cpu")


def loss_one_by_one(model: LlamaForCausalLM, inputs: np.ndarray, targets: np.ndarray) -> tuple[torch.Tensor, int]:
    """Every document of every row in a forward of its own: the summed loss and the number of targets."""
    nll, count = torch.zeros(()), 0
    for row, following in zip(inputs.tolist(), targets.tolist(), strict=True):
        while row:
            end = row.index(EOS) + 1 if EOS in row else len(row)
            document, wanted = row[:end], following[: end - 1] + [-100 if row[end - 1] == EOS else following[end - 1]]
            logits = model(torch.tensor([document])).logits[0]
            nll = nll + torch.nn.functional.cross_entropy(logits, torch.tensor(wanted), reduction="sum")
            count += sum(t != -100 for t in wanted)
            row, following = row[end:], following[end:]
    return nll, count


def gradients(model: LlamaForCausalLM, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# --- what the loader makes ------------------------------------------------------------------------------------------


def test_positions_restart_and_the_first_token_of_a_document_is_no_target():
    inputs = np.array([[5, 6, 1, 7, 1, 1, 8, 4], [9, 2, 2, 2, 2, 2, 2, 1]])
    targets = np.array([[6, 1, 7, 1, 1, 8, 4, 9], [2, 2, 2, 2, 2, 2, 1, 3]])
    batch = as_batch(inputs, targets, DocumentMask(EOS, "sdpa"))
    assert set(batch) == {"input_ids", "labels", "shift_labels", "position_ids"}
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert batch["shift_labels"].tolist() == [[6, 1, -100, 1, -100, -100, 4, 9], [2, 2, 2, 2, 2, 2, 1, -100]]
    assert batch["position_ids"].dtype == batch["shift_labels"].dtype == torch.int64
    assert targets[0, 2] == 7, "the array that was read is not changed"


def test_flash_attention_gets_the_borders_as_offsets_that_do_not_cross_rows():
    batch = as_batch(*np.array([[[5, 1, 7, 8], [9, 2, 1, 4]]] * 2), DocumentMask(EOS, "flash_attention_2"))
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 2, 4, 7, 8]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 4


def test_without_the_mask_a_batch_is_what_it_was():
    batch = collate(Rows(np.array([[5, 1, 7, 8]]), None, [0], 3))
    assert set(batch) == {"input_ids", "labels", "shift_labels"}
    assert batch["shift_labels"].tolist() == [[1, 7, 8]]


@pytest.mark.parametrize("seed", range(5))
def test_random_rows_give_what_a_plain_loop_gives(seed):
    stream = make_stream(8 * 16 + 1, seed)
    inputs, targets = stream[:-1].reshape(8, 16), stream[1:].reshape(8, 16)
    batch = as_batch(inputs, targets, DocumentMask(EOS, "sdpa"))
    positions, labels = separate_documents(inputs, targets, EOS)
    assert np.array_equal(batch["position_ids"], positions)
    assert np.array_equal(batch["shift_labels"], labels)


def test_the_documents_found_are_those_of_the_document_map(prepared):
    blocks, documents = Blocks(prepared.folder, "train"), DocumentMap(prepared.folder, "train")
    starts = documents.first_tokens.to_numpy().astype(np.int64)
    starts = starts[starts < blocks.num_tokens]
    mask = DocumentMask(blocks.manifest.tokenizer.eos_token_id, "sdpa")
    tokens = blocks.read(np.arange(blocks.num_blocks))
    inputs, targets = tokens[:, :-1].reshape(-1, 16), tokens[:, 1:].reshape(-1, 16)
    batch = as_batch(inputs, targets, mask)
    expected = np.zeros(blocks.num_tokens, dtype=bool)
    expected[starts] = True
    expected[::16] = True  # a row's border is a fresh context
    assert np.array_equal(batch["position_ids"].numpy().reshape(-1) == 0, expected)
    no_target = np.flatnonzero(batch["shift_labels"].numpy().reshape(-1) == -100)
    assert np.array_equal(no_target[:-1] + 1, starts[1:]) and no_target[-1] == blocks.num_tokens - 1


# --- the same loss and gradients as one by one ----------------------------------------------------------------------

ROWS = {
    "documents across row borders": make_stream(6 * 16 + 1),
    "a row without an end": np.append(np.arange(10, 10 + 32), 5),
    "rows that are one document each": np.tile(np.append(np.arange(20, 35), EOS), 3)[: 2 * 16 + 1],
    "empty documents": np.array([EOS, EOS, 7, EOS, EOS, EOS, 8, 9, EOS, 4, EOS, EOS, EOS, 5, 6, EOS, 9]),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("stream", ROWS.values(), ids=ROWS.keys())
def test_loss_and_gradients_are_those_of_the_documents_one_by_one(attention, stream):
    inputs, targets = stream[:-1].reshape(-1, 16), stream[1:].reshape(-1, 16)
    model = make_model(attention)
    nll, count = loss_one_by_one(model, inputs, targets)
    expected = gradients(model, nll / count)
    batch = as_batch(inputs, targets, DocumentMask(EOS, attention))
    assert (batch["shift_labels"] != -100).sum() == count
    loss = model(**batch, num_items_in_batch=count).loss
    assert loss.item() == pytest.approx((nll / count).item(), abs=1e-6)
    found = gradients(model, loss)
    assert all(torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-6) for name in expected)


def test_blocks_that_are_cut_into_shorter_rows_have_the_loss_of_their_documents(prepared):
    blocks = Blocks(prepared.folder, "train")
    has_end = np.flatnonzero((blocks.read(np.arange(blocks.num_blocks))[:, :-1] == EOS).any(axis=1))[:6]
    order = Order([OrderSource(blocks.num_blocks)], [OrderStage(blocks.num_blocks, (Fraction(1),))], 1, shuffle=False)
    rows = TrainBlocks([blocks], order, 16, blocks.num_blocks).__getitems__(has_end.tolist())
    inputs, targets = rows.split()
    assert inputs.shape == (24, 16)
    model = make_model()
    nll, count = loss_one_by_one(model, inputs, targets)
    loss = model(**collate(rows, DocumentMask(EOS, "sdpa")), num_items_in_batch=count).loss
    assert loss.item() == pytest.approx((nll / count).item(), rel=1e-6)


def test_evaluation_counts_targets_and_their_bytes_only_and_is_the_loss_of_the_documents(prepared):
    from transformers import AutoTokenizer

    blocks = Blocks(prepared.folder, "train")
    token_bytes = token_byte_lengths(AutoTokenizer.from_pretrained(prepared.folder / "tokenizer"))
    ends = np.flatnonzero(blocks.read(np.arange(blocks.num_blocks))[:, :-1] == EOS)
    num_rows = int(ends[2]) // 16 + 1
    rows, model = ValidationRows("v", blocks, 16, 16 * num_rows), make_model()
    inputs, targets = rows.read(0, num_rows)
    with torch.no_grad():
        nll, count = loss_one_by_one(model, inputs, targets)

    def forward(batch):
        return model(**batch, num_items_in_batch=1).loss

    for batch_rows in (4, num_rows):
        found = sum_losses(forward, rows, token_bytes, batch_rows, CPU, mask=DocumentMask(EOS, "sdpa"))
        assert found.num_tokens == count == inputs.size - (inputs == EOS).sum() < inputs.size
        assert found.nll == pytest.approx(nll.item(), rel=1e-6)
        assert found.num_bytes == token_bytes[targets[inputs != EOS]].sum()
