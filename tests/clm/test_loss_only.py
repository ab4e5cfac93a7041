"""The loss-only forward gives the loss and the gradients of transformers' own, for every type of model that gets it."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import EOS, SHAPE, make_model, make_stream
from transformers import AutoConfig, AutoModelForCausalLM

from clm.attention import MASK_FREE, register_mask_free
from clm.dataset import as_batch
from clm.document_mask import DocumentMask
from clm.loss_only import MODEL_TYPES, WAYS, install

SMALL = {
    **SHAPE,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
}
CLOSE = 1e-6  # of the loss; gradients as a whole, relative to their norm


def small_model(kind: str, is_tied: bool = False):
    config = AutoConfig.for_model(kind)
    for name, value in SMALL.items():
        if name in config.attribute_map or hasattr(config, name):
            setattr(config, name, value)
    config.update({"tie_word_embeddings": is_tied, "initializer_range": 0.2, "use_cache": False, "pad_token_id": None})
    config.update({"bos_token_id": 0, "eos_token_id": EOS})
    if hasattr(config, "layer_types"):
        config.layer_types = ["full_attention"] * 2
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = True
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()


def some_batch(mask: DocumentMask | None = None, num_rows: int = 4):
    stream = make_stream(num_rows * 32 + 1)
    inputs, targets = stream[:-1].reshape(num_rows, 32), stream[1:].reshape(num_rows, 32).copy()
    targets[0, 5] = -100
    return as_batch(inputs, targets, mask)


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def assert_same(stock, fast, stock_loss, fast_loss):
    assert abs(fast_loss - stock_loss) <= CLOSE * abs(stock_loss)
    expected = gradients(stock)
    assert (gradients(fast) - expected).norm() <= 2 * CLOSE * expected.norm()


@pytest.mark.parametrize("way, is_tied", [("whole", False), ("chunked", True)])
@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_loss_and_gradients_are_those_of_transformers(kind, is_tied, way):
    register_mask_free()
    stock = small_model(kind, is_tied)
    fast = copy.deepcopy(stock)
    fast.set_attn_implementation(MASK_FREE)
    install(fast, way)
    batch = some_batch()
    num_items = int((batch["shift_labels"] != -100).sum())
    expected = stock(**batch, num_items_in_batch=num_items)
    got = fast(**batch, num_items_in_batch=num_items)
    assert getattr(got, "logits", None) is None and expected.logits is not None
    assert fast(**batch).loss.item() == pytest.approx(got.loss.item(), rel=CLOSE), "without a number: the mean"
    loss = got.loss
    if "moe" in kind or kind == "mixtral":
        assert got.aux_loss.item() == pytest.approx(expected.aux_loss.item(), rel=CLOSE)
        loss = loss + fast.config.router_aux_loss_coef * got.aux_loss
    expected.loss.backward()
    loss.backward()
    assert_same(stock, fast, expected.loss.item(), loss.item())


@pytest.mark.parametrize("way", WAYS)
def test_two_micro_batches_add_up_to_one(way):
    one, two = make_model().train(), make_model().train()
    for model in (one, two):
        model.config.attention_dropout = 0.0
    install(two, way)
    batch = some_batch()
    num_items = int((batch["shift_labels"] != -100).sum())
    expected = one(**batch, num_items_in_batch=num_items).loss
    expected.backward()
    total = 0.0
    for half in (slice(0, 2), slice(2, 4)):
        loss = two(**{name: value[half] for name, value in batch.items()}, num_items_in_batch=1).loss / num_items
        loss.backward()
        total += loss.item()
    assert_same(one, two, expected.item(), total)


@pytest.mark.parametrize("way", WAYS)
def test_documents_stay_apart(way):
    mask = DocumentMask(EOS, "sdpa")
    stock, fast = make_model(), make_model()
    install(fast, way)
    batch = some_batch(mask)
    expected, got = stock(**batch).loss, fast(**batch).loss
    expected.backward()
    got.backward()
    assert_same(stock, fast, expected.item(), got.item())
    one_row = some_batch(mask, num_rows=1)
    ids, targets = one_row["input_ids"][0], one_row["shift_labels"][0]
    ends = [*(ids == EOS).nonzero()[:, 0].tolist(), len(ids) - 1]
    summed, first = 0.0, 0
    with torch.no_grad():
        for end in ends:  # each document alone in its row
            here = slice(first, end + 1)
            if first <= end and (targets[here] != -100).any():
                alone = fast(input_ids=ids[None, here], shift_labels=targets[None, here], num_items_in_batch=1).loss
                summed += alone.item()
            first = end + 1
        together = fast(**one_row, num_items_in_batch=1).loss.item()
    assert together == pytest.approx(summed, rel=CLOSE)


@pytest.mark.parametrize("way", WAYS)
def test_in_bf16_the_loss_is_summed_in_fp32(way):
    stock, fast = make_model().train(), make_model().train()
    for model in (stock, fast):
        model.config.attention_dropout = 0.0
    install(fast, way)
    batch = some_batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = stock(**batch).loss, fast(**batch).loss
    assert got.dtype == torch.float32
    expected.backward()
    got.backward()
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    difference = (gradients(fast) - gradients(stock)).norm() / gradients(stock).norm()
    assert difference < 0.01


@pytest.mark.parametrize("way", WAYS)
def test_the_z_loss_has_the_gradients_of_its_formula_and_adds_up_over_micro_batches(way, monkeypatch):
    monkeypatch.setattr("clm.loss_only.CHUNK_ROWS", 48)  # several chunks, the last one smaller
    plain, fast = make_model().train(), make_model().train()
    for model in (plain, fast):
        model.config.attention_dropout = 0.0
    install(fast, way, z_loss=0.1)
    batch = some_batch()
    targets = batch["shift_labels"]
    num_items = int((targets != -100).sum())
    logits = plain(batch["input_ids"]).logits.flatten(0, 1)
    cross_entropy = torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=-100)
    z_loss = 0.1 * torch.logsumexp(logits, 1)[targets.flatten() != -100].square().mean()
    (cross_entropy + z_loss).backward()
    total = {"loss": 0.0, "cross_entropy": 0.0, "z_loss": 0.0}
    for here in (slice(0, 1), slice(1, 4)):
        part = {name: value[here] for name, value in batch.items()}
        outputs = fast(**part, num_items_in_batch=1, with_z_loss=True)
        (outputs.loss / num_items).backward()
        total = {name: value + outputs[name].item() / num_items for name, value in total.items()}
    assert z_loss.item() > 0.1 * cross_entropy.item(), "enough of it that a mistake would show"
    assert total["cross_entropy"] == pytest.approx(cross_entropy.item(), rel=CLOSE)
    assert total["z_loss"] == pytest.approx(z_loss.item(), rel=CLOSE)
    assert_same(plain, fast, (cross_entropy + z_loss).item(), total["loss"])
    without = fast(**batch, num_items_in_batch=num_items)
    assert without.loss.item() == pytest.approx(cross_entropy.item(), rel=CLOSE) and without.z_loss is None


def test_calls_without_targets_are_transformers_own():
    plain, fast = make_model(), make_model()
    install(fast, "whole")
    ids = torch.arange(2, 34)[None]
    with torch.no_grad():
        assert torch.equal(fast(ids).logits, plain(ids).logits)
        assert torch.equal(fast(ids, labels=ids).loss, plain(ids, labels=ids).loss)
        by_our_way = fast(ids, return_logits=True)
        assert torch.equal(by_our_way.logits, plain(ids).logits)
    assert fast.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 35)


def test_it_is_in_no_file(tmp_path):
    model = make_model()
    install(model, "whole")
    model.save_pretrained(tmp_path)
    assert "loss_only" not in (tmp_path / "config.json").read_text()
    assert [*AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()] == [*make_model().state_dict()]
