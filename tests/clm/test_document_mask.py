"""Documents of one row are trained as if each had a row of its own, and a back end that mixes them is refused."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, masking_utils, modeling_flash_attention_utils

from clm.dataset import TrainBlocks, ValidationRows, as_batch, collate
from clm.document_mask import DocumentMask, check_no_leak
from clm.evaluate import sum_losses
from clm.order import Order, OrderSource, OrderStage
from clm.reload import separate_documents
from data_prep.blocks import Blocks
from data_prep.documents import DocumentMap
from data_prep.errors import UserError
from data_prep.token_bytes import token_byte_lengths

EOS = 1
CPU = torch.device("cpu")

needs_flash = pytest.mark.skipif(
    not (torch.cuda.is_available() and modeling_flash_attention_utils.is_flash_attn_2_available()),
    reason="needs a CUDA device and the package flash-attn",
)


def make_model(attention: str = "sdpa", kind: type = LlamaForCausalLM) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        use_cache=False,  # as Trainer sets it
    )
    model = kind(config).eval()
    model.config._attn_implementation = attention  # also one whose package is not installed here
    return model


def check(model: LlamaForCausalLM, attention: str, shape: tuple[int, int] = (3, 32), device=CPU, wrapped=None) -> None:
    check_no_leak(model, DocumentMask(EOS, attention), shape, 384, device, "tiny.yaml", wrapped)


def make_stream(num_tokens: int, seed: int = 0) -> np.ndarray:
    """Documents of 0 to 24 tokens and their EOS, cut at num_tokens."""
    random = np.random.default_rng(seed)
    documents = [np.append(random.integers(2, 384, random.integers(0, 25)), EOS) for _ in range(num_tokens)]
    return np.concatenate(documents)[:num_tokens]


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
    batch = collate((np.array([[5, 1, 7]]), np.array([[1, 7, 8]]), [0]))
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
    inputs, targets, _ = rows
    assert inputs.shape == (24, 16)
    model = make_model()
    nll, count = loss_one_by_one(model, inputs, targets)
    loss = model(**collate(rows, DocumentMask(EOS, "sdpa")), num_items_in_batch=count).loss
    assert loss.item() == pytest.approx((nll / count).item(), abs=1e-6)


def test_evaluation_counts_targets_and_their_bytes_only_and_is_the_loss_of_the_documents(prepared):
    from transformers import AutoTokenizer

    blocks = Blocks(prepared.folder, "validation")
    token_bytes = token_byte_lengths(AutoTokenizer.from_pretrained(prepared.folder / "tokenizer"))
    rows, model = ValidationRows("v", blocks, 16, 16 * 30), make_model()
    inputs, targets = rows.read(0, 30)
    with torch.no_grad():
        nll, count = loss_one_by_one(model, inputs, targets)
    forward = lambda batch: model(**batch, num_items_in_batch=1).loss  # noqa: E731
    for batch_rows in (4, 30):
        found = sum_losses(forward, rows, token_bytes, batch_rows, CPU, mask=DocumentMask(EOS, "sdpa"))
        assert found.num_tokens == count == 480 - (inputs == EOS).sum() < 480
        assert found.nll == pytest.approx(nll.item(), rel=1e-6)
        assert found.num_bytes == token_bytes[targets[inputs != EOS]].sum()


# --- the test of the back end ---------------------------------------------------------------------------------------


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
    model = make_model(name).to("cuda")
    stream = make_stream(8 * 128 + 1)
    with torch.autocast("cuda", torch.bfloat16):
        check(model, name, (8, 128), torch.device("cuda"))
        batch = as_batch(stream[:-1].reshape(8, 128), stream[1:].reshape(8, 128), DocumentMask(EOS, name))
        loss = model(**{n: v.to("cuda") if torch.is_tensor(v) else v for n, v in batch.items()}).loss
        loss.backward()
    reference = make_model("eager")(
        **as_batch(stream[:-1].reshape(8, 128), stream[1:].reshape(8, 128), DocumentMask(EOS, "eager"))
    ).loss
    assert loss.item() == pytest.approx(reference.item(), rel=2e-2)


def test_transformers_still_finds_documents_by_positions():
    found = masking_utils.find_packed_sequence_indices(torch.tensor([[0, 1, 2, 0, 0, 1]]))
    assert found.tolist() == [[0, 0, 0, 1, 2, 2]]
