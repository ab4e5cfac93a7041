"""What metrics.jsonl says about speed: tokens per second, MFU, waiting for data, step times, memory, energy.

In: Trainer's events. Out: numbers at log points (`take`); between them nothing waits for the device.

MFU = tokens per second and device x FLOPs per token / the device's dense bf16 peak, by the convention of PaLM
(Chowdhery et al. 2022, appendix B), in which a causal mask saves nothing:

    FLOPs per token = 6 N + 12 L A T        N matrix parameters that work on a token (embedding lookups are free, a tied
                                            matrix counts once, as head; of E experts k), L layers, A heads x their size
    llama_170m, T = 512: 6 x 141,029,376 + 12 x 12 x 768 x 512 = 902,799,360
"""

from __future__ import annotations

import math
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

if TYPE_CHECKING:
    from transformers import PretrainedConfig, TrainingArguments

    from clm.plan import Plan
    from clm.timeline import Stage

# Dense bf16 TFLOP/s, fp32 sums, from NVIDIA's data sheets; the first name that is part of the device's counts.
PEAK_TFLOPS = (
    ("B200", 2250.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("GH200", 989.0),
    ("H200", 989.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("L4", 121.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)


def flops_per_token(model: torch.nn.Module, config: PretrainedConfig, block_size: int) -> int:
    """Floating-point operations of training on one token, forward and backward; on the meta device too."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    head = model.get_output_embeddings()
    if head is not None:
        embeddings.discard(id(head.weight))
    num_matrix = 0
    for parameter in model.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # DeepSpeed's stage 3 leaves empty ones behind
        if len(shape) < 2 or id(parameter) in embeddings:
            continue
        count = math.prod(shape)
        # a tensor of three dimensions is fused experts
        num_matrix += count * config.num_experts_per_tok // shape[0] if len(shape) == 3 else count
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 6 * num_matrix + 12 * config.num_hidden_layers * config.num_attention_heads * head_size * block_size


def peak_flops(device_name: str, override_tflops: float | None) -> float | None:
    """The dense bf16 peak of a device in FLOP/s; None where it is not known."""
    if override_tflops is not None:
        return override_tflops * 1e12
    return next((tflops * 1e12 for name, tflops in PEAK_TFLOPS if name in device_name), None)


def make_meter(plan: Plan, stage: Stage, model: torch.nn.Module, args: TrainingArguments) -> Meter:
    """The meter of a run; without MFU where the peak or the model's FLOPs are not known, or in fp32."""
    override = plan.recipe.run.peak_tflops
    peak = None
    if override is not None or (args.device.type == "cuda" and plan.precision != "fp32"):
        peak = peak_flops(torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "", override)
    has_shape = hasattr(model, "get_output_embeddings") and hasattr(plan.config, "num_attention_heads")
    flops = flops_per_token(model, plan.config, stage.block_size) if has_shape else None
    return Meter(args.device, flops, peak, args.world_size)


class Meter(TrainerCallback):
    """Notes times and waits, and works them out at log points.

    Args:
        device: where the model runs.
        flops_per_token: of `flops_per_token`, or None where it cannot be counted.
        peak: of one device, or None: no MFU.
        num_devices: that share the tokens.
    """

    def __init__(self, device: torch.device, flops_per_token: int | None, peak: float | None, num_devices: int):
        self.device, self.flops, self.peak, self.num_devices = device, flops_per_token, peak, num_devices
        self.wait_s = 0.0  # for batches, since the last log point
        self.marks: list[Any] = []  # the beginning and the end of each step: seconds, or events of the GPU
        self.energy = open_energy_counter(device)
        self.energy_before: float | None = None

    def on_step_begin(self, args, state, control, **kwargs):
        self.marks.append(mark_time(self.device))
        if self.energy_before is None and self.energy is not None:
            self.energy_before = self.energy()

    def on_step_end(self, args, state, control, **kwargs):
        self.marks.append(mark_time(self.device))

    def take(self, tokens_per_step: int) -> dict[str, float]:
        """The numbers since the last call; the device has just been waited for.

        Tokens per second are counted over steps, by the device's own clock: a host only queues a GPU's work, and is
        done with the last steps before the device is.
        """
        begins, ends = self.marks[::2], self.marks[1::2]
        self.marks = []
        found: dict[str, float] = {}
        seconds = [seconds_between(begin, end) for begin, end in zip(begins, ends, strict=False)]
        if seconds and sum(seconds) > 0:
            found["tokens_per_s"] = len(seconds) * tokens_per_step / sum(seconds)
            found["step_p50_s"] = statistics.median(seconds)
            found["step_p95_s"] = sorted(seconds)[max(0, -(-95 * len(seconds) // 100) - 1)]
            found["input_wait_fraction"] = self.wait_s / (sum(seconds) + self.wait_s)
        self.wait_s = 0.0
        if "tokens_per_s" in found and self.peak and self.flops:
            found["mfu"] = found["tokens_per_s"] / self.num_devices * self.flops / self.peak
        if self.device.type == "cuda":
            found["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
        if self.energy is not None:
            now = self.energy()
            if self.energy_before is not None:
                found["energy_j"] = now - self.energy_before
            self.energy_before = now
        return found


def mark_time(device: torch.device) -> Any:
    """This moment in the device's own work: on a GPU an event in its queue, which nothing waits for; else seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(begin: Any, end: Any) -> float:
    """Between two marks; those of a GPU must have passed."""
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000


def open_energy_counter(device: torch.device) -> Any:
    """A function that reads the joules this GPU has used since its driver was loaded; None without NVML."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        properties = torch.cuda.get_device_properties(device)
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # not installed, no right, or a device that does not count
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
