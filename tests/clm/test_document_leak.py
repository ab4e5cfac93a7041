"""The test of the model before a masked run: attention that keeps documents apart passes, one that leaks is named."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny import EOS, make_model, make_stream
from transformers import LlamaForCausalLM, masking_utils, modeling_flash_attention_utils

from clm.dataset import as_batch
from clm.document_mask import DocumentMask, check_no_leak
from data_prep.errors import UserError

CPU = torch.device("cpu")

needs_flash = pytest.mark.skipif(
    not (torch.cuda.is_available() and modeling_flash_attention_utils.is_flash_attn_2_available()),
    reason="needs a CUDA device and the package flash-attn",
)


def check(model: LlamaForCausalLM, attention: str, shape: tuple[int, int] = (3, 32), device=CPU, wrapped=None) -> None:
    check_no_leak(model, DocumentMask(EOS, attention), shape, 384, device, "tiny.yaml", wrapped)


class WithAttentionMask(LlamaForCausalLM):
    """Passes a mask of ones, as many loaders do, upon which transformers looks for documents no more."""

    def forward(self, input_ids, **kwargs):
        return super().forward(input_ids, attention_mask=torch.ones_like(input_ids), **kwargs)


class WithBooleanMask(LlamaForCausalLM):
    """Passes a boolean 4D mask, which eager attention adds to its scores instead of masking with it."""

    def forward(self, input_ids, position_ids, **kwargs):
        document = (position_ids == 0).cumsum(1)
        mask = (document[:, :, None] == document[:, None]).tril()[:, None]
        return super().forward(input_ids, attention_mask=mask, position_ids=position_ids, **kwargs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", [(1, 4), (3, 7), (8, 32), (1, 128)])
def test_sdpa_and_eager_keep_documents_apart(attention, shape):
    check(make_model(attention), attention, shape)


def test_a_cache_an_attention_mask_and_a_mask_of_the_wrong_kind_are_caught():
    model = make_model()
    model.config.use_cache = True
    with pytest.raises(UserError, match="With eager this llama model does the same. Set data.document_mask: false"):
        check(model, "sdpa")
    with pytest.raises(UserError, match="documents of one row see each other"):
        check(make_model(kind=WithAttentionMask), "sdpa")
    with pytest.raises(UserError, match=r"(?s)tiny.yaml: model.attention is eager.*Set model.attention: sdpa \(tested"):
        check(make_model("eager", WithBooleanMask), "eager")


def test_an_attention_without_masks_is_caught_and_those_that_work_are_named():
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("causal_only", sdpa_attention_forward)  # no mask function: transformers makes no mask
    model = make_model("causal_only")
    with pytest.raises(UserError, match=r"Set model.attention: sdpa or eager \(tested just now\), or") as error:
        check(model, "causal_only")
    assert "move the logits of the next one by" in str(error.value)
    assert model.config._attn_implementation == "causal_only"


def test_the_test_leaves_no_trace():
    model = make_model().train()
    model(torch.zeros((1, 4), dtype=torch.int64)).logits.sum().backward()
    gradients_before = {name: p.grad.clone() for name, p in model.named_parameters()}
    weights_before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    numpy_state = str(np.random.get_state())
    check(model, "sdpa")
    assert model.training and torch.equal(torch.get_rng_state(), state) and str(np.random.get_state()) == numpy_state
    assert all(torch.equal(p.grad, gradients_before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(value, weights_before[name]) for name, value in model.state_dict().items())


def test_a_model_whose_logits_say_nothing_is_not_tested_and_the_log_says_so(caplog):
    model = make_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    check(model, "sdpa")
    assert "not tested" in caplog.text


# --- FlashAttention -------------------------------------------------------------------------------------------------


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float | None) -> torch.Tensor:
    """Causal attention of one sequence, (T, heads, width)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale)
    return out[0].transpose(0, 1)


def reference_flash(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    return torch.stack([attend(*each, softmax_scale) for each in zip(q, k, v, strict=True)])


def reference_flash_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
):
    assert causal and cu_seqlens_q.dtype == torch.int32
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.diff().max() <= max_seqlen_q
    borders = cu_seqlens_q.tolist()
    return torch.cat([attend(q[a:b], k[a:b], v[a:b], softmax_scale) for a, b in pairwise(borders)])


@pytest.fixture
def flash_kernels(monkeypatch):
    """transformers' own FlashAttention path on a CPU: flash-attn's two functions written in PyTorch."""
    kernels = (reference_flash, reference_flash_varlen, None, None, None)
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_process_flash_kwargs_fn"):
        monkeypatch.setattr(modeling_flash_attention_utils, name, None)  # loaded anew, and put back behind the test
    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", lambda *args, **kwargs: kernels)


@pytest.mark.parametrize("shape", [(1, 32), (3, 32)])
def test_flash_attention_keeps_documents_apart_in_any_number_of_rows(flash_kernels, shape):
    check(make_model("flash_attention_2"), "flash_attention_2", shape)


def test_flash_attention_gives_the_loss_of_sdpa(flash_kernels):
    stream = make_stream(6 * 16 + 1)
    inputs, targets = stream[:-1].reshape(-1, 16), stream[1:].reshape(-1, 16)
    losses = [
        make_model(name)(**as_batch(inputs, targets, DocumentMask(EOS, name))).loss.item()
        for name in ("flash_attention_2", "sdpa")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_flash_attention_that_gets_positions_alone_mixes_documents_and_is_caught(flash_kernels):
    class WithoutOffsets(LlamaForCausalLM):
        def forward(self, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, **kwargs):
            return super().forward(**kwargs)

    check(make_model("flash_attention_2", WithoutOffsets), "flash_attention_2", (1, 32))  # one row: transformers looks
    with pytest.raises(UserError, match="model.attention is flash_attention_2 but"):
        check(make_model("flash_attention_2", WithoutOffsets), "flash_attention_2", (2, 32))


def test_flash_attention_offsets_that_run_over_row_borders_are_caught(flash_kernels):
    class OverRowBorders(LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            length = input_ids.shape[1]
            inside = kwargs["cu_seq_lens_q"] % length != 0
            inside[[0, -1]] = True
            offsets = kwargs["cu_seq_lens_q"][inside]
            kwargs |= {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
            longest = dict.fromkeys(("max_length_q", "max_length_k"), input_ids.numel())
            return super().forward(input_ids, **kwargs | longest)

    with pytest.raises(UserError, match="differ by .* from those of the same document alone in a row"):
        check(make_model("flash_attention_2", OverRowBorders), "flash_attention_2")


# --- slow, and on a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sdpa_keeps_documents_apart_when_compiled_and_a_leak_is_caught_there_too():
    torch._dynamo.reset()
    model = make_model()
    compiled = torch.compile(model)
    check(model, "sdpa", wrapped=compiled)
    batch = as_batch(*make_stream(97)[:-1].reshape(2, 3, 16), DocumentMask(EOS, "sdpa"))
    assert compiled(**batch).loss.item() == pytest.approx(model(**batch).loss.item(), abs=1e-5)
    leaking = make_model(kind=WithAttentionMask)
    with pytest.raises(UserError, match="documents of one row see each other"):
        check(leaking, "sdpa", wrapped=torch.compile(leaking))


@pytest.mark.slow
def test_flex_attention_keeps_documents_apart():
    torch._dynamo.reset()  # a second shape would be compiled with dynamic sizes, which torch 2.13 cannot on a CPU
    check(make_model("flex_attention"), "flex_attention")


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention", pytest.param("flash", marks=needs_flash)])
def test_on_a_gpu_in_bf16_documents_are_kept_apart(attention):
    name = "flash_attention_2" if attention == "flash" else attention
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    heads_of_16 = {"hidden_size": 64}  # FlexAttention's kernels have none smaller
    model = make_model(name, **heads_of_16).to("cuda")
    stream = make_stream(8 * 128 + 1)
    with torch.autocast("cuda", torch.bfloat16):
        check(model, name, (8, 128), torch.device("cuda"))
        batch = as_batch(stream[:-1].reshape(8, 128), stream[1:].reshape(8, 128), DocumentMask(EOS, name))
        loss = model(**{n: v.to("cuda") if torch.is_tensor(v) else v for n, v in batch.items()}).loss
        loss.backward()
    reference = make_model("eager", **heads_of_16)(
        **as_batch(stream[:-1].reshape(8, 128), stream[1:].reshape(8, 128), DocumentMask(EOS, "eager"))
    ).loss
    assert loss.item() == pytest.approx(reference.item(), rel=2e-2)


def test_transformers_still_finds_documents_by_positions():
    found = masking_utils.find_packed_sequence_indices(torch.tensor([[0, 1, 2, 0, 0, 1]]))
    assert found.tolist() == [[0, 0, 0, 1, 2, 2]]
