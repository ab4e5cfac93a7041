"""Which attention a run gets and why; the mask-free one is causal, reads nothing of the data, and leaves no trace."""

from __future__ import annotations

import json

import pytest
import torch
from reads import count_reads
from tiny import SHAPE, make_model
from transformers import LlamaConfig, MistralConfig
from transformers.integrations import sdpa_attention

from clm.attention import MASK_FREE, choose_attention, needs_mask, register_mask_free
from clm.loss_only import install
from data_prep.errors import UserError


def mask_free_model():
    register_mask_free()
    model = make_model(MASK_FREE)
    install(model, "whole")
    return model


@pytest.fixture
def masks_seen(monkeypatch):
    """What PyTorch's SDPA was called with: (the mask, is_causal) of each layer."""
    seen, real = [], torch.nn.functional.scaled_dot_product_attention

    def note(*args, attn_mask=None, is_causal=False, **kwargs):
        seen.append((None if attn_mask is None else tuple(attn_mask.shape), is_causal))
        return real(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(sdpa_attention.torch.nn.functional, "scaled_dot_product_attention", note)
    return seen


def test_auto_is_explained_and_what_cannot_work_is_refused():
    assert choose_attention("auto", bf16=True, has_gpu=False)[0] == MASK_FREE
    assert choose_attention("sdpa", bf16=False, has_gpu=True)[0] == MASK_FREE
    assert choose_attention("auto", False, False, has_document_mask=True)[0] == "sdpa"
    name, why = choose_attention("auto", True, True, why_masked="the model has a sliding window of 8 tokens")
    assert (name, why) == (
        "sdpa",
        "auto: PyTorch's kernels with transformers' mask, since the model has a sliding window of 8 tokens",
    )
    assert choose_attention("eager", bf16=False, has_gpu=False)[0] == "eager"
    assert choose_attention("flex", bf16=False, has_gpu=True)[0] == "flex_attention"
    for number in (2, 3, 4):
        with pytest.raises(UserError, match="there is no CUDA GPU"):
            choose_attention(f"flash_attention_{number}", bf16=True, has_gpu=False)
        with pytest.raises(UserError, match="Set training.bf16: true"):
            choose_attention(f"flash_attention_{number}", bf16=False, has_gpu=True)
        with pytest.raises(UserError, match="package is not installed"):
            choose_attention(f"flash_attention_{number}", bf16=True, has_gpu=True)
    with pytest.raises(UserError, match="on a CPU PyTorch has no backward for it"):
        choose_attention("flex", bf16=False, has_gpu=False)


def test_a_window_shorter_than_a_row_needs_a_mask():
    assert needs_mask(LlamaConfig(**SHAPE), 128) is None
    assert needs_mask(MistralConfig(**SHAPE, sliding_window=128), 128) is None
    assert "sliding window of 64" in needs_mask(MistralConfig(**SHAPE, sliding_window=64), 128)
    config = LlamaConfig(**SHAPE)
    config.layer_types = ["full_attention", "chunked_attention"]
    assert "chunked_attention" in needs_mask(config, 16)


def test_a_training_forward_has_no_mask_and_reads_no_value(masks_seen):
    ids = torch.randint(0, 384, (2, 32))
    with count_reads() as stock:
        make_model("sdpa")(input_ids=ids, labels=ids)
    assert stock.num_reads > 0, "transformers looks for documents in every forward; if no more, drop our attention"
    model = mask_free_model()
    masks_seen.clear()
    with count_reads() as ours:
        model(input_ids=ids, shift_labels=ids, num_items_in_batch=1)
    assert masks_seen == [(None, True)] * 2 and ours.num_reads == 0


def test_compiled_attention_is_causal_without_a_mask():
    from transformers import AttentionInterface

    from clm import attention

    seen = []

    def note(module, query, key, value, attention_mask, **kwargs):
        seen.append(attention_mask is None)
        return sdpa_attention.sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    ids = torch.randint(0, 384, (2, 32))
    for name in ("sdpa", MASK_FREE):
        AttentionInterface.register(name, note)
    try:
        with torch.no_grad():
            torch.compile(make_model("sdpa"), backend="eager")(input_ids=ids, labels=ids)
            model = make_model(MASK_FREE)
            install(model, "whole")
            torch.compile(model, backend="eager")(input_ids=ids, shift_labels=ids, num_items_in_batch=1)
    finally:
        AttentionInterface.register("sdpa", sdpa_attention.sdpa_attention_forward)
        attention.register_mask_free()
        torch.compiler.reset()
    assert seen == [False, False, True, True], "transformers masks compiled SDPA, ours does not; if neither, drop ours"


def test_padding_is_masked_again_in_generation():
    plain, fast = make_model("sdpa"), mask_free_model()
    ids = torch.randint(2, 384, (2, 8))
    padding = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
    settings = {"max_new_tokens": 8, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    expected = plain.generate(ids, attention_mask=padding, **settings)
    assert torch.equal(fast.generate(ids, attention_mask=padding, **settings), expected)
    assert fast.config._attn_implementation == MASK_FREE, "training goes on without masks"
    with torch.no_grad():
        assert torch.equal(fast(ids, attention_mask=padding).logits, plain(ids, attention_mask=padding).logits)


def test_our_name_is_in_no_file(tmp_path):
    mask_free_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert MASK_FREE not in json.dumps(config) and "loss_only" not in json.dumps(config)
    make_model().save_pretrained(tmp_path / "plain")
    assert config == json.loads((tmp_path / "plain" / "config.json").read_text())
