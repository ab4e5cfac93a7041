"""What document masking costs: tokens/s of training steps with and without it, on this machine.

    python -m benchmarks.document_mask [--config FILE] [--lengths 256 512 1024] [--attention sdpa eager] > costs.jsonl

In: a model config. Out: one JSON line per measured step on stdout, and a table of medians on stderr. The same random
tokens, documents of 10 to 1,000 of them, are trained on in turn without and with the mask (A B A B ...), so that a
machine whose speed drifts slows down both. A step is loading (as the DataLoader's worker does it), forward, backward
and AdamW. On a CPU: fp32, one thread, and the CPU time of this process, so that other programs do not count. On a GPU:
bf16 autocast and the clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # it is started as a file, too

from clm.dataset import as_batch
from clm.document_mask import DocumentMask
from clm.model import draw_weights, load_config

EOS = 1
DOCUMENT_TOKENS = (10, 1000)  # shortest and longest; the logarithm of the length is uniform: 215 on average


def make_rows(num_rows: int, length: int, vocab_size: int, random: np.random.Generator) -> np.ndarray:
    """Rows (num_rows, length + 1) of documents that end with EOS, each row with the token after it."""
    tokens = random.integers(2, vocab_size, num_rows * length + 1)
    low, high = np.log(DOCUMENT_TOKENS)
    ends = np.cumsum(np.exp(random.uniform(low, high, len(tokens) // DOCUMENT_TOKENS[0] + 1)).astype(np.int64))
    tokens[ends[ends < len(tokens)]] = EOS
    return np.stack([tokens[i * length : (i + 1) * length + 1] for i in range(num_rows)])


def measure(config_path: str, attention: str, length: int, num_tokens: int, num_repeats: int) -> list[dict]:
    """Seconds of each step, in the order in which they were run; the first of each kind is not counted."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    now = time.perf_counter if device.type == "cuda" else time.process_time
    config = load_config(config_path)
    config.use_cache = False
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).to(device)
    draw_weights(model, 0, False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    random, records = np.random.default_rng(0), []
    for repeat in range(num_repeats + 1):
        rows = make_rows(num_tokens // length, length, config.vocab_size, random)
        for mask in (None, DocumentMask(EOS, attention)):
            began_at = now()
            batch = as_batch(rows[:, :-1], rows[:, 1:], mask)
            loaded_at = now()
            batch = {name: v.to(device) if torch.is_tensor(v) else v for name, v in batch.items()}
            with torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext():
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            time_s = now() - began_at
            record = {
                "attention": attention,
                "block_size": length,
                "rows": len(rows),
                "document_mask": mask is not None,
                "time_s": round(time_s, 4),
                "load_s": round(loaded_at - began_at, 6),
                "tokens_per_s": round(rows.shape[0] * length / time_s, 1),
                "num_documents": int((rows[:, :-1] == EOS).sum()) + len(rows),
            }
            if repeat:
                records.append(record)
                print(json.dumps(record), flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="model_configs/llama_20m.json")
    parser.add_argument("--attention", nargs="+", default=["sdpa"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 512, 1024])
    parser.add_argument("--tokens", type=int, default=2048, help="of a micro-batch, in rows of each length")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, one thread"
    table = [
        f"{arguments.config} on {device}, torch {torch.__version__}, {arguments.tokens} tokens per step",
        "attention  block_size  tokens/s without  with mask  ratio (lowest ... highest)  loader with mask",
    ]
    for attention in arguments.attention:
        for length in arguments.lengths:
            records = measure(arguments.config, attention, length, arguments.tokens, arguments.repeats)
            without, masked = (
                [r["tokens_per_s"] for r in records if r["document_mask"] is is_masked] for is_masked in (False, True)
            )
            ratios = [b / a for a, b in zip(without, masked, strict=True)]
            load_ms = 1000 * statistics.median(r["load_s"] for r in records if r["document_mask"])
            speeds = f"{statistics.median(without):>16,.0f}  {statistics.median(masked):>9,.0f}"
            spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} ... {max(ratios):.3f})"
            table.append(f"{attention:<9}  {length:>10}  {speeds}  {spread}      {load_ms:.2f} ms")
    print("\n".join(table), file=sys.stderr)


if __name__ == "__main__":
    main()
