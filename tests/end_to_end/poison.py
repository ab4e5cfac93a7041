"""Prepared data with random tokens in chosen blocks, and what a run on it did: for the tests of spikes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from clm.events import read_events
from clm.replay import open_replay
from data_prep.blocks import Blocks
from data_prep.manifest import content_fingerprint, load_manifest

from .conftest import read_metrics

BAD = (41, 42)  # the steps whose batches are poisoned, of 60
LONG = (
    "data.tokens=30720",
    "run.spikes.window=16",
    "run.preflight=false",
    "training.save_steps=10",
    "training.eval_strategy=no",
    "training.per_device_train_batch_size=16",
)


def poison(folder: Path, blocks: np.ndarray, token: int | None = None) -> None:
    """Overwrite blocks with random tokens, or with one, and the manifest's checksums with what the files have then."""
    split, rng = Blocks(folder, "train"), np.random.default_rng(1)
    manifest = json.loads((folder / "manifest.json").read_text())
    shards, rows = split.locate(blocks)
    for number in np.unique(shards):
        shard = manifest["splits"]["train"]["shards"][number]
        content = bytearray((folder / shard["file"]).read_bytes())
        start = content.index(split.shard_tokens(int(number)).tobytes())
        for row in rows[shards == number]:
            tokens = rng.integers(4, 384, split.block_size) if token is None else np.full(split.block_size, token)
            noise = tokens.astype(split.dtype).tobytes()
            first = start + row * len(noise)
            content[first : first + len(noise)] = noise
        (folder / shard["file"]).write_bytes(content)
        shard["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    known = load_manifest(folder)
    manifest["fingerprint"] = content_fingerprint(known.tokenizer.sha256, known.block_size, known.dtype, known.splits)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def on(dataset: Path, policy: str, *more: str) -> list[str]:
    """Overrides: train on `dataset` with a policy; it is always evaluated on the clean data."""
    return [*LONG, f"data.mixture=[{{dataset: {dataset}}}]", f"run.spikes.policy={policy}", *more]


def final_loss(run: Path) -> float:
    return next(r["eval_loss"] for r in reversed(read_metrics(run)) if "eval_loss" in r)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def excluded_blocks(run: Path) -> set[int]:
    """The blocks that rollbacks took out of a run, by its own record."""
    replay = open_replay(run)
    samples = [np.arange(first, end) for first, end in replay.timeline.excluded]
    return set(replay.order.block_at(np.concatenate(samples))[1].tolist())


def spikes(run: Path, kind: str = "spike") -> list[dict]:
    return [event for event in read_events(run) if event["event"] == kind]
