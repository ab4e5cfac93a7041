"""The certificate of `verify`: what was compared, what it was, and for which recipe it holds.

In: the checks of clm/verify.py. Out: certificate.json and certificate.txt in the run's folder, and the text that a
model card embeds, where the certificate is that of the run's own recipe and data.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clm.checkpoint import write_json
from clm.order import ORDER_VERSION
from clm.recipe import load_recipe
from clm.run_folder import read_recipe
from clm.run_record import identity, versions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clm.plan import Plan
    from clm.recipe import Recipe
    from clm.replay import Replay

FILE = "certificate.json"
_TITLES = {
    "order": "against the order that the recipe alone gives",
    "killed": "killed and resumed, against the run that was not, bit for bit",
    "moved": "killed and resumed in other layouts, against the run that was not",
}


@dataclass(frozen=True)
class Check:
    """One comparison; `sha256` is of what the uninterrupted run gave, `other_sha256` of the other, where it differs."""

    run: str
    what: str
    passed: bool
    result: str
    sha256: str
    other_sha256: str | None = None

    @classmethod
    def equal(cls, run: str, what: str, expected: Any, found: Any) -> Check:
        """Both are the same, down to the last bit."""
        ours, other = fingerprint(expected), fingerprint(found)
        if ours == other:
            return cls(run, what, True, "equal", ours)
        return cls(run, what, False, _first_difference(expected, found), ours, other)

    @classmethod
    def close(
        cls, run: str, what: str, expected: Mapping[int, float], found: Mapping[int, float], tolerance: float
    ) -> Check:
        """The same steps, and no value further off than the tolerance."""
        ours, other = fingerprint(expected), fingerprint(found)
        if expected.keys() != found.keys():
            return cls(run, what, False, _first_difference(expected, found), ours, other)
        largest = max(abs(value - found[step]) for step, value in expected.items())
        result = f"largest difference {largest:.1e}, allowed {tolerance:.0e}"
        return cls(run, what, largest <= tolerance, result, ours, None if ours == other else other)


def fingerprint(value: Any) -> str:
    """SHA-256 of a nest of dicts, sequences, tensors, arrays and numbers, by content: floats by all of their bits."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, dict):
        digest.update(b"{%d" % len(value))
        for name in sorted(value, key=str):
            digest.update(repr(name).encode())
            _feed(digest, value[name])
    elif isinstance(value, list | tuple):
        digest.update(b"[%d" % len(value))
        for child in value:
            _feed(digest, child)
    elif hasattr(value, "detach"):
        import torch

        tensor = value.detach().to("cpu").contiguous()
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif hasattr(value, "tobytes"):
        digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    else:
        digest.update(repr(value).encode())
    digest.update(b",")


def _first_difference(expected: Any, found: Any) -> str:
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted({*expected, *found}):
            if expected.get(key) != found.get(key):
                return f"DIFFERENT from step {key} on: {expected.get(key)!r:.60}, then {found.get(key)!r:.60}"
    return "DIFFERENT"


def write_certificate(
    run: Path, recipe: Recipe, whole: Plan, copy: Plan, checks: list[Check], kills: list[dict[str, Any]], seed: int
) -> dict[str, Any]:
    """Write certificate.json and certificate.txt; returns the content.

    Args:
        run: folder of the run that the recipe names.
        recipe: as the user wrote it.
        whole: its plan.
        copy: the plan of the small copy that was trained.
        checks: the comparisons.
        kills: when it was killed.
        seed: of the moments.
    """
    content = {
        "recipe": str(recipe.path),
        "identity": identity(recipe, whole.fingerprints),
        "passed": all(check.passed for check in checks) and {kill["run"] for kill in kills} == {"killed", "moved"},
        "made_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": f"CPU, {platform.machine()}, {platform.system()}",
        "versions": versions(),
        "order_version": ORDER_VERSION,
        "datasets": whole.fingerprints,
        "order_sha256": order_sha256(whole),
        "optimizer": ("muon + " if copy.recipe.run.optimizer == "muon" else "")
        + str(copy.training.get("optim", "adamw_torch_fused")),
        "schedule": str(copy.training.get("lr_scheduler_type", "linear")),
        "stages": [
            {
                "name": stage.name,
                "num_steps": stage.num_steps,
                "block_size": stage.block_size,
                "tokens_per_step": stage.tokens_per_step,
            }
            for stage in copy.timeline.stages
        ],
        "seed": seed,
        "kills": kills,
        "checks": [asdict(check) for check in checks],
    }
    content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    write_json(run / FILE, content)
    temporary = run / ".certificate.tmp"
    temporary.write_text(describe(content) + "\n", encoding="utf-8")
    os.replace(temporary, run / "certificate.txt")
    return content


def order_sha256(plan: Plan | Replay) -> str:
    """SHA-256 of the blocks of 64 steps of the whole run, spread from the first to the last: the order as it is."""
    steps = sorted({1 + (plan.timeline.num_steps - 1) * i // 63 for i in range(64)})
    blocks = [plan.order.block_at(plan.timeline.samples_of_step(step)) for step in steps]
    return fingerprint([[part.tolist() for part in each] for each in blocks])


def describe(certificate: dict[str, Any]) -> str:
    """The certificate as text."""
    versions = certificate["versions"]
    stages = ", ".join(
        f"{s['num_steps']} steps of {s['tokens_per_step'] // s['block_size']} rows x {s['block_size']} tokens"
        for s in certificate["stages"]
    )
    lines = [
        f"resume certificate of {certificate['recipe']}: {'PASSED' if certificate['passed'] else 'FAILED'}",
        f"  recipe and data   {certificate['identity'][:16]}   order version {certificate['order_version']}, "
        f"blocks of 64 steps of the run {certificate['order_sha256'][:16]}",
        f"  trained           a tiny Llama in fp32 on {certificate['device']}; {certificate['optimizer']}, "
        f"{certificate['schedule']}; {stages}",
        f"  with              Python {versions['python']}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, {certificate['made_at']}, seed {certificate['seed']}",
    ]
    for run, title in _TITLES.items():
        lines.append(f"{title}:")
        for kill in certificate["kills"]:
            if kill["run"] == run:
                where = "during a save" if kill["in_a_save"] else "between saves"
                lines.append(f"  SIGKILL after step {kill['after_step']}, {where} ({kill['layout']})")
        for check in certificate["checks"]:
            if check["run"] == run:
                lines.append(f"  {check['what']:<32} {check['result']:<46} {check['sha256'][:16]}")
    return "\n".join(lines)


def text_for_card(run: Path) -> str | None:
    """The text of a run's certificate, if it has one that passed and is of the run's recipe and data."""
    path = run / FILE
    if not path.is_file():
        return None
    certificate = json.loads(path.read_text(encoding="utf-8"))
    datasets = read_recipe(run)["resolved"].get("datasets") or []
    own = identity(load_recipe(run / "recipe.yaml"), {d["name"]: d["fingerprint"] for d in datasets})
    return describe(certificate) if certificate["passed"] and certificate["identity"] == own else None
