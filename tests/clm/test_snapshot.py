import numpy as np
import torch

from clm.snapshot import copy_to_host, num_bytes_to_copy
from data_prep.memory import available_memory


def make_state():
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    return {
        "model": {"embed": weight.detach(), "head": weight.detach(), "turned": torch.arange(6.0).reshape(2, 3).T},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.9, 0.95), "lr": 1e-3}]},
        "random": ("MT19937", np.arange(3), 7),
    }


def test_a_copy_does_not_change_with_the_original_and_tied_weights_stay_tied():
    state = make_state()
    copied = copy_to_host(state, {})
    state["model"]["embed"].zero_()
    state["optimizer"]["param_groups"][0]["lr"] = 0.0
    assert copied["model"]["embed"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert copied["model"]["embed"].data_ptr() == copied["model"]["head"].data_ptr()
    assert copied["model"]["turned"].stride() == (1, 3)
    assert copied["optimizer"] == {
        "state": {0: {"step": torch.tensor(3.0)}},
        "param_groups": [{"betas": (0.9, 0.95), "lr": 1e-3}],
    }
    assert copied["random"] is state["random"]


def test_the_second_copy_goes_into_the_memory_of_the_first():
    buffers = {}
    first = copy_to_host(make_state(), buffers)
    state = make_state()
    state["model"]["embed"].add_(1)
    state["optimizer"]["state"][1] = {"step": torch.tensor(4.0)}  # what did not exist before gets memory of its own
    second = copy_to_host(state, buffers)
    assert second["model"]["embed"].data_ptr() == first["model"]["embed"].data_ptr()
    assert second["model"]["embed"][0].tolist() == [1, 2, 3]
    assert second["optimizer"]["state"][1]["step"].item() == 4


def test_tied_weights_are_counted_once():
    assert num_bytes_to_copy(make_state()) == 24 + 24 + 4


def test_available_memory_is_the_machines_or_the_containers(tmp_path):
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    proc.mkdir()
    cgroup.mkdir()
    assert available_memory(proc, cgroup) is None
    (proc / "meminfo").write_text("MemTotal:  100 kB\nMemAvailable:   50 kB\n")
    assert available_memory(proc, cgroup) == 50 * 1024
    for name, text in (("memory.max", "max\n"), ("memory.current", "4096\n"), ("memory.stat", "inactive_file 1024\n")):
        (cgroup / name).write_text(text)
    assert available_memory(proc, cgroup) == 50 * 1024
    (cgroup / "memory.max").write_text("10240\n")
    assert available_memory(proc, cgroup) == 10240 - 4096 + 1024
    assert available_memory() > 0
