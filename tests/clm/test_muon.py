"""Muon's update is that of torch.optim.Muon, experts one by one; every parameter has its place."""

from __future__ import annotations

import pytest
import torch
from tiny import make_mixtral, make_model
from torch import nn

from clm.muon import MuonAdamW, group_parameters, make_optimizer

SETTINGS = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1, "adjust": "original"}


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_matrices_move_as_torchs_muon_moves_them(adjust):
    torch.manual_seed(0)
    shapes = [(64, 32), (32, 64), (48, 48), (64, 32)]
    theirs = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    ours = [nn.Parameter(p.detach().clone()) for p in theirs]
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust)
    optimizer = MuonAdamW(ours, [{"params": [nn.Parameter(torch.ones(3))]}], {**SETTINGS, "adjust": adjust}, {})
    for _ in range(4):
        for a, b in zip(theirs, ours, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        before = [p.detach().clone() for p in theirs]
        reference.step()
        optimizer.step()
        for a, b, was in zip(theirs, ours, before, strict=True):
            assert (a - b).norm() <= 0.01 * (a - was).norm()  # bf16 in another order of additions; 0 on the CPU tried


def test_a_fused_expert_tensor_is_many_matrices(monkeypatch):
    torch.manual_seed(0)
    fused = nn.Parameter(torch.randn(4, 64, 32))
    each = [nn.Parameter(matrix.clone()) for matrix in fused.detach()]
    fused.grad = torch.randn(fused.shape)
    for matrix, grad in zip(each, fused.grad, strict=True):
        matrix.grad = grad.clone()
    monkeypatch.setattr("clm.muon.STACK_ELEMENTS", 3 * 64 * 32)  # and stacks are cut
    MuonAdamW([fused], [{"params": [nn.Parameter(torch.ones(1))]}], SETTINGS, {}).step()
    MuonAdamW(each, [{"params": [nn.Parameter(torch.ones(1))]}], SETTINGS, {}).step()
    assert torch.allclose(fused.detach(), torch.stack([m.detach() for m in each]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [make_model, make_mixtral], ids=["llama", "mixtral"])
def test_each_parameter_is_in_exactly_one_group(make):
    model = make()
    groups = group_parameters(model)
    names = [*groups.muon, *groups.adamw_decayed, *groups.adamw]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    muon = {"learning_rate": 0.02, "momentum": 0.95, "weight_decay": 0.1, "adjust": "original"}
    optimizer = make_optimizer(model, {"lr": 1e-3}, 0.1, muon)
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3, 0.02]
    for group in optimizer.param_groups:
        is_matrix = {p.dim() >= 2 for p in group["params"]}
        assert is_matrix == {group["weight_decay"] > 0}, "weight decay on matrices only"


def test_what_is_hidden_goes_to_muon_and_what_is_not_to_adamw():
    groups = group_parameters(make_mixtral())
    assert {name.rpartition("layers.")[2].partition(".")[2] for name in groups.muon} == {
        *(f"self_attn.{p}_proj.weight" for p in "qkvo"),
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    }
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.gate.weight"} <= {*groups.adamw_decayed}
    tied = make_model()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    assert group_parameters(tied).adamw_decayed == ["model.embed_tokens.weight"], "once"


def test_a_loaded_state_continues_bit_by_bit():
    def steps(model, optimizer, seeds):
        for seed in seeds:
            torch.manual_seed(seed)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape)
            optimizer.step()

    def optimizer_of(model):
        muon = {"learning_rate": 0.02, "momentum": 0.95, "weight_decay": 0.1, "adjust": "original"}
        return make_optimizer(model, {"lr": 1e-3, "fused": True}, 0.1, muon)

    straight, resumed = make_mixtral(), make_mixtral()
    one, two = optimizer_of(straight), optimizer_of(resumed)
    steps(straight, one, range(4))
    steps(resumed, two, range(2))
    again = make_mixtral()
    again.load_state_dict(resumed.state_dict())
    three = optimizer_of(again)
    three.load_state_dict(two.state_dict())
    steps(again, three, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), again.parameters(), strict=True))
