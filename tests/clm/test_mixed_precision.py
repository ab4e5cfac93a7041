"""Under bf16 autocast experts and, on request, the residual stream are bf16; weights and gradients stay fp32."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny import make_mixtral, make_model

from clm.attention import MASK_FREE, register_mask_free
from clm.loss_only import install
from clm.mixed_precision import EXPERTS, cast_residual_stream, use_autocast_experts, use_fp8


@pytest.fixture
def expert_dtypes(monkeypatch):
    """dtypes of input and weight of each grouped product."""
    seen, real = [], torch.nn.functional.grouped_mm

    def note(x, weight, **kwargs):
        seen.append((x.dtype, weight.dtype))
        return real(x, weight, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", note)
    return seen


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_experts_follow_autocast_which_transformers_do_not(expert_dtypes):
    ids = torch.randint(0, 384, (2, 32), generator=torch.Generator().manual_seed(0))
    exact, stock, ours = make_mixtral(), make_mixtral(), make_mixtral()
    assert use_autocast_experts(ours)
    expected = exact(input_ids=ids, labels=ids).loss
    expected.backward()
    expert_dtypes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        stock(input_ids=ids, labels=ids)
    assert set(expert_dtypes) == {(torch.float32, torch.float32)}, "if transformers casts them now, ours can go"
    expert_dtypes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(input_ids=ids, labels=ids).loss
    assert set(expert_dtypes) == {(torch.bfloat16, torch.bfloat16)} and len(expert_dtypes) == 4
    loss.backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in ours.parameters())
    assert loss.item() == pytest.approx(expected.item(), rel=5e-3)
    assert (gradients(ours) - gradients(exact)).norm() < 0.1 * gradients(exact).norm()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_experts_that_follow_autocast_are_compiled_without_a_break_of_ours():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    model, graphs, breaks = make_mixtral(), counters["stats"]["unique_graphs"], set(counters["graph_break"])
    register_mask_free()
    model.config._attn_implementation = MASK_FREE
    use_autocast_experts(model)
    install(model, "whole")
    ids = torch.randint(0, 384, (2, 32), generator=torch.Generator().manual_seed(0))
    found = []
    for called in (model, torch.compile(model, dynamic=False)):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = called(input_ids=ids, shift_labels=ids, output_router_logits=True)
        (outputs.loss + outputs.aux_loss).backward()
        found.append((outputs.loss.item(), outputs.aux_loss.item(), gradients(model)))
        model.zero_grad()
    assert found[1][:2] == pytest.approx(found[0][:2], rel=1e-3)
    assert (found[1][2] - found[0][2]).norm() < 0.1 * found[0][2].norm()
    assert counters["stats"]["unique_graphs"] > graphs
    # transformers 5.17 counts an expert's tokens by bincount, which torch.compile cannot; 5.23 does not
    assert all("bincount" in reason for reason in set(counters["graph_break"]) - breaks)


@pytest.mark.slow
def test_fp8_is_in_the_blocks_alone_and_in_no_file(tmp_path):
    pytest.importorskip("torchao")
    from transformers import AutoModelForCausalLM

    plain, fp8 = make_model().train(), make_model().train()
    names = use_fp8(fp8, emulate=True)
    assert len(names) == 2 * 7 and all(".layers." in name for name in names)
    kinds = {name: type(module).__name__ for name, module in fp8.named_modules()}
    assert {kinds[name] for name in names} == {"Float8Linear"} and kinds["lm_head"] == "Linear"
    ids = torch.arange(2, 66).reshape(2, 32)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [model(ids, labels=ids).loss for model in (plain, fp8)]
    assert 0 < abs(losses[0] - losses[1]) < 0.05 * losses[0], "other roundings, and no other model"
    for loss in losses:
        loss.backward()
    one, other = gradients(plain), gradients(fp8)
    assert torch.cosine_similarity(one, other, dim=0) > 0.95
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in fp8.parameters())
    assert [*fp8.state_dict()] == [*plain.state_dict()]
    fp8.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], value) for name, value in plain.state_dict().items())


@pytest.mark.slow
def test_of_a_mixture_fp8_takes_the_attention_and_leaves_routers_and_experts():
    pytest.importorskip("torchao")
    names = use_fp8(make_mixtral(), emulate=True)
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj"} and len(names) == 8


def test_without_autocast_and_in_files_nothing_changes(tmp_path):
    ids = torch.arange(2, 34)[None]
    plain, ours = make_mixtral(), make_mixtral()
    use_autocast_experts(ours)
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, ours(ids).logits)
    ours.save_pretrained(tmp_path)
    assert EXPERTS not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert not use_autocast_experts(make_model()), "no experts"


def test_the_residual_stream_is_bf16_under_autocast_only():
    ids = torch.arange(2, 34)[None]
    plain, cast = make_model(), make_model()
    cast_residual_stream(cast)
    seen = []
    for model in (plain, cast):
        model.model.layers[1].register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        losses = [model(ids, labels=ids).loss for model in (plain, cast)]
    assert seen == [torch.float32, torch.bfloat16]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=2e-2)
    losses[1].backward()
    assert all(p.grad.dtype == torch.float32 for p in cast.parameters())
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, cast(ids).logits)
