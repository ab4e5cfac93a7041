"""MFU by hand-checked numbers, and what the meter works out from times."""

from __future__ import annotations

import sys
import time
import types
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from clm.meter import Meter, flops_per_token, open_energy_counter, peak_flops

CONFIGS = Path(__file__).resolve().parents[2] / "model_configs"
PER_TOKEN = {
    # N = 12 (2 x 768^2 + 2 x 768 x 192 + 3 x 768 x 3,072) + 50,000 x 768 = 141,029,376
    ("llama_170m", 512): 6 * 141_029_376 + 12 * 12 * 768 * 512,
    ("llama_170m", 2048): 1_072_668_672,
    # tied: the head's matrix counts once. N = all parameters but the norms' 65 x 1,024
    ("llama_437m", 1024): 6 * (437_584_896 - 65 * 1024) + 12 * 32 * 1024 * 1024,
    # 2 of 6 experts. N = 24 (4 x 1,024^2 + 6 x 1,024 + 2 x 3 x 1,024 x 3,112) + 50,257 x 1,024
    ("mixtral_1.6b", 8192): 6 * 611_156_992 + 12 * 24 * 1024 * 8192,
}


@pytest.mark.parametrize("name, block_size", PER_TOKEN)
def test_flops_per_token_are_those_by_hand(name, block_size):
    config = AutoConfig.from_pretrained(CONFIGS / f"{name}.json")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert flops_per_token(model, config, block_size) == PER_TOKEN[name, block_size]


def test_the_peak_is_known_by_name_or_not_at_all():
    assert peak_flops("NVIDIA H200", None) == peak_flops("NVIDIA H100 80GB HBM3", None) == 989e12
    assert peak_flops("NVIDIA H100 PCIe", None) == 756e12 and peak_flops("NVIDIA L40S", None) == 362e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", None) == 312e12
    assert peak_flops("Some New Chip", None) is None
    assert peak_flops("Some New Chip", 500.0) == 5e14


def test_what_the_meter_says():
    meter = Meter(torch.device("cpu"), 902_799_360, 989e12, num_devices=1)
    meter.marks = [0.0, 0.1, 0.1, 0.2, 0.2, 0.5]
    meter.wait_s = 0.125
    found = meter.take(16_667)
    assert found["tokens_per_s"] == pytest.approx(3 * 16_667 / 0.5)
    assert found["mfu"] == pytest.approx(0.0913, abs=5e-5)  # 90.28 TFLOP/s of 989
    assert found["step_p50_s"] == pytest.approx(0.1) and found["step_p95_s"] == pytest.approx(0.3)
    assert found["input_wait_fraction"] == pytest.approx(0.125 / 0.625)
    assert meter.take(16_667) == {}, "no step since"
    unknown = Meter(torch.device("cpu"), 1, None, 1)
    unknown.marks = [0.0, 0.1]
    assert "mfu" not in unknown.take(10), "unknown device: none printed"


def test_energy_is_read_from_nvml_by_the_uuid_of_the_runs_device(monkeypatch):
    """A stand-in for the driver's library; the real one: test_on_a_gpu_energy_is_counted."""
    millijoules = iter([5_000_000, 5_000_000, 5_001_500, 5_004_000])  # opening, step begins, two log points
    nvml = types.ModuleType("pynvml")
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetHandleByUUID = {"GPU-7a-b": "handle"}.__getitem__
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: next({"handle": millijoules}[handle])
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="7a-b"))
    assert open_energy_counter(torch.device("cpu")) is None
    meter = Meter(torch.device("cpu"), None, None, 1)
    meter.energy = open_energy_counter(torch.device("cuda"))
    meter.on_step_begin(None, None, None)
    meter.on_step_end(None, None, None)
    assert meter.take(10)["energy_j"] == pytest.approx(1.5)
    meter.on_step_begin(None, None, None)
    meter.on_step_end(None, None, None)
    assert meter.take(10)["energy_j"] == pytest.approx(2.5), "from one log point to the next"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="a part of it"))
    assert open_energy_counter(torch.device("cuda")) is None, "unknown to NVML: no number, and the run goes on"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_energy_is_counted():
    pytest.importorskip("pynvml")
    counter = open_energy_counter(torch.device("cuda"))
    if counter is None:
        pytest.skip("NVML does not count this device's energy")
    before, x = counter(), torch.randn(4096, 4096, device="cuda")
    began_at = time.perf_counter()
    while time.perf_counter() - began_at < 1:
        x @ x
        torch.cuda.synchronize()
    assert 10 < counter() - before < 5000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_step_lasts_until_the_device_is_done():
    meter = Meter(torch.device("cuda"), None, None, 1)
    x = torch.randn(4096, 4096, device="cuda")
    torch.mm(x, x)
    torch.cuda.synchronize()
    began_at = time.perf_counter()
    for _ in range(5):
        meter.on_step_begin(None, None, None)
        for _ in range(20):
            torch.mm(x, x)
        meter.on_step_end(None, None, None)
    queued_s = time.perf_counter() - began_at
    torch.cuda.synchronize()
    whole_s = time.perf_counter() - began_at
    assert queued_s < whole_s / 2, "the host is done long before"
    found = meter.take(1000)
    assert found["tokens_per_s"] == pytest.approx(5 * 1000 / whole_s, rel=0.1)
    assert found["peak_memory_bytes"] >= 2 * 4 * 4096**2
