"""The model card of a run: recipe.yaml, metrics.jsonl and the manifests -> README.md in Hub format.

Every number in it was measured or follows from the recipe. What is not known is left out, or called "not measured".
Only the keys named here are ever copied from a recipe, so no token or account name can get into a card.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clm.certificate import text_for_card
from clm.curve import draw_curve
from clm.events import read_events
from clm.licences import hub_licence
from clm.run_folder import last_evaluation, read_metrics, read_recipe
from clm.spike_report import describe_history
from data_prep.errors import UserError
from data_prep.manifest import load_manifest

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

_RESUME = (
    "A small copy of this run's recipe, on this data, was killed and resumed, and compared with one that was not "
    "(`python -m clm verify`)."
)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def write_card(run: Path, folder: Path, is_ema: bool = False) -> Path:
    """Write `folder`/README.md, and beside it curve.svg, for the model that lies in `folder`.

    Args:
        run: the run's folder.
        folder: a model in Hub format (config.json and weights): final/, a checkpoint or an export.
        is_ema: it holds the averaged weights of run.ema.
    """
    recipe, metrics = read_recipe(run), read_metrics(run)
    evaluation = last_evaluation(metrics, is_ema)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = run.resolve().name
    has_curve = any("loss" in record or "eval_loss" in record for record in metrics)
    if has_curve:
        shutil.copyfile(draw_curve(run), folder / "curve.svg")

    header, licence_note = _header(recipe, config, name, evaluation)
    parts = [
        f"---\n{header.to_yaml()}\n---",
        f"# {name}",
        _summary(recipe, metrics, config),
        *([_average(recipe)] if is_ema else []),
        "## Use\n\n" + _usage(config),
        "## Model\n\n" + _model_table(recipe, config),
        "## Data\n\n" + _data_table(recipe, metrics) + f"\n\n{licence_note}",
        "## Training\n\n" + _training_table(recipe, metrics),
        *filter(None, [_stages_table(recipe), _lineage(run), describe_history(run)]),
        *(["![Training and validation loss over tokens](curve.svg)"] if has_curve else []),
        "## Validation\n\n" + _validation_table(recipe, evaluation),
        *([f"## Resume\n\n{_RESUME}\n\n```text\n{certificate}\n```"] if (certificate := text_for_card(run)) else []),
        "## Limits\n\n" + _limits(),
    ]
    path = folder / "README.md"
    temporary = folder / ".README.md.tmp"
    temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def _header(recipe: dict, config: dict, name: str, evaluation: dict | None) -> tuple[ModelCardData, str]:
    """The YAML header, and the sentence about the licence."""
    from huggingface_hub import EvalResult, ModelCardData

    resolved = recipe["resolved"]
    datasets = resolved.get("datasets") or []
    init = str(resolved.get("init") or "random")
    licence = hub_licence([dataset.get("licence") for dataset in datasets]) if init == "random" else None
    named = ", ".join(f"{dataset['name']}: {dataset.get('licence') or 'unknown'}" for dataset in datasets) or "unknown"
    if init != "random":
        note = f"Licence: that of the base model and of the data ({named}) apply."
    elif licence:
        note = f"Licence: {licence}, that of all of its data."
    else:
        note = f"Licence: not settled by the data alone ({named}); whoever publishes the model chooses and names it."
    repositories = {dataset["name"]: _repositories(dataset) for dataset in datasets}
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=next(iter(repositories.get(set_name, [])), set_name),
            dataset_name=f"{set_name} (validation split)",
            metric_type=metric,
            metric_value=value,
        )
        for set_name, scores in _scores(recipe, evaluation)
        if set_name
        for metric, value in (("loss", scores["loss"]), ("bits_per_byte", scores.get("bits_per_byte")))
        if value is not None
    ]
    is_base = not _is_lm(config)
    header = ModelCardData(
        license=licence or "other",
        library_name="transformers",
        pipeline_tag="feature-extraction" if is_base else "text-generation",
        tags=["pretraining", str(config.get("model_type", "llama")), "causal-lm"],
        base_model=init if _HUB_ID.fullmatch(init) and not Path(init).exists() else None,
        datasets=sorted({repository for named in repositories.values() for repository in named}) or None,
        eval_results=results or None,
        model_name=name,
    )
    return header, note


def _repositories(dataset: dict[str, Any]) -> list[str]:
    """The Hub datasets that a prepared dataset was made from, where its manifest can still be read and names them."""
    try:
        sources = load_manifest(dataset["folder"]).settings.get("sources") or []
    except UserError:
        return []  # moved or deleted since
    return [source["repository"] for source in sources if source.get("repository")]


def _is_lm(config: dict) -> bool:
    return any("CausalLM" in name for name in config.get("architectures") or [])


def _summary(recipe: dict, metrics: list[dict], config: dict) -> str:
    resolved = recipe["resolved"]
    init = str(resolved.get("init") or "random")
    if init == "random":
        start = "trained from random weights"
    elif _HUB_ID.fullmatch(init) and not Path(init).exists():
        start = f"continued from {init}"
    else:
        start = f"continued from the local model {Path(init).name}"
    architecture = (config.get("architectures") or ["causal language model"])[0]
    parameters = _parameters(resolved)
    size = f" of {parameters} parameters" if parameters else ""
    text = f"{architecture}{size}, {start} on {_tokens_seen(metrics):,} tokens."
    is_whole = _tokens_seen(metrics) >= resolved.get("num_tokens", 0)
    return text if is_whole else text + " The run has not finished: this is a state on the way."


def _average(recipe: dict) -> str:
    return (
        "These weights are the exponential moving average of those that were trained, with a decay of "
        f"{recipe['run']['ema']['decay']:g} for each step."
    )


def _usage(config: dict) -> str:
    auto = "AutoModelForCausalLM" if _is_lm(config) else "AutoModel"
    lines = [
        f"from transformers import {auto}, AutoTokenizer",
        "",
        'folder = "."  # this folder, or its id on the Hub',
        f"model = {auto}.from_pretrained(folder)",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
    ]
    if _is_lm(config):
        lines += [
            'inputs = tokenizer("Once", return_tensors="pt", return_token_type_ids=False)',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50, do_sample=True, top_k=20)[0]))",
        ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _model_table(recipe: dict, config: dict) -> str:
    return _table(
        ("", ""),
        [
            ("Parameters", _parameters(recipe["resolved"])),
            ("Width", config.get("hidden_size")),
            ("Layers", config.get("num_hidden_layers")),
            ("Attention heads", config.get("num_attention_heads")),
            ("Key-value heads", config.get("num_key_value_heads")),
            ("Feed-forward width", config.get("intermediate_size")),
            ("Experts", config.get("num_local_experts")),
            ("Experts per token", config.get("num_experts_per_tok") if config.get("num_local_experts") else None),
            ("Vocabulary", config.get("vocab_size")),
            ("Positions", config.get("max_position_embeddings")),
            ("Embeddings", {True: "tied", False: "not tied"}.get(config.get("tie_word_embeddings"))),
            ("Weights stored as", config.get("dtype") or config.get("torch_dtype")),
        ],
    )


def _data_table(recipe: dict, metrics: list[dict]) -> str:
    datasets = recipe["resolved"].get("datasets") or []
    total_weight = sum(dataset["weight"] for dataset in datasets)
    rows = []
    for dataset in datasets:
        share, size = dataset["weight"] / total_weight, dataset.get("num_tokens")
        passes = f"{share * _tokens_seen(metrics) / size:.3g}" if size else "not measured"
        links = [f"[{name}](https://huggingface.co/datasets/{name})" for name in _repositories(dataset)]
        label = dataset["name"] + (f" ({', '.join(links)})" if links else "")
        fingerprint = f"`{dataset['fingerprint'][:16]}`"
        if size and "padding_fraction" in dataset:
            size = f"{size:,}, {dataset['padding_fraction']:.2%} of them padding"
        licence = dataset.get("licence") or "unknown"
        rows.append((label, f"{share:.2%}", size or "not measured", passes, licence, fingerprint))
    return _table(("Dataset", "Share of the run", "Tokens", "Passes", "Licence", "Fingerprint"), rows)


def _training_table(recipe: dict, metrics: list[dict]) -> str:
    training, data, resolved = recipe.get("training") or {}, recipe.get("data") or {}, recipe["resolved"]
    steps, tokens = (metrics[-1].get("step"), _tokens_seen(metrics)) if metrics else (None, None)
    time_s = next((record["time_s"] for record in reversed(metrics) if "time_s" in record), None)
    versions = resolved.get("versions") or {}
    betas = (training.get("adam_beta1"), training.get("adam_beta2"))
    schedule = [training.get("lr_scheduler_type"), training.get("lr_scheduler_kwargs") or None]
    commit = resolved.get("git_commit")
    uses_muon = (recipe.get("run") or {}).get("optimizer") == "muon"
    return _table(
        ("", ""),
        [
            ("Tokens", tokens),
            (
                "Steps",
                f"{steps:,} of {resolved['num_steps']:,}" if steps is not None and resolved.get("num_steps") else steps,
            ),
            ("Tokens per step", _of_stages(resolved, "tokens_per_step")),
            ("Block size", _of_stages(resolved, "block_size") or data.get("block_size")),
            ("Optimizer", f"Muon and {training.get('optim')}" if uses_muon else training.get("optim")),
            ("Peak learning rate", training.get("learning_rate")),
            ("Schedule", ", ".join(str(part) for part in schedule if part) or None),
            ("Warm-up", training.get("warmup_steps")),
            ("Betas", f"{betas[0]}, {betas[1]}" if None not in betas else None),
            ("Weight decay", training.get("weight_decay")),
            ("Gradient clipping", training.get("max_grad_norm")),
            ("Seed", training.get("seed")),
            ("Precision", resolved.get("precision")),
            ("Attention", resolved.get("attention")),
            ("Device", resolved.get("device")),
            ("Training time", f"{time_s:,.0f} s" if time_s else "not measured"),
            ("Tokens per second", f"{tokens / time_s:,.0f}" if time_s and tokens else "not measured"),
            ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or None),
            ("Git commit of the code", f"`{commit}`" if commit else None),
        ],
    )


def _of_stages(resolved: dict, key: str) -> Any:
    """A value that all stages share, or those of the stages in order."""
    values = [stage[key] for stage in resolved.get("stages") or []]
    if len(set(values)) <= 1:
        return values[0] if values else None
    return ", then ".join(f"{value:,}" for value in values)


def _stages_table(recipe: dict) -> str:
    rows = [
        (
            stage["name"],
            stage["num_tokens"],
            stage["block_size"],
            stage["tokens_per_step"],
            ", ".join(f"{name} {share:.2%}" for name, share in stage["shares"].items()),
        )
        for stage in recipe["resolved"].get("stages") or []
    ]
    return _table(("Stage", "Tokens", "Block size", "Tokens per step", "Data"), rows) if len(rows) > 1 else ""


def _lineage(run: Path) -> str:
    """Where the run was forked off, made longer, or changed on its way."""
    lines = []
    for event in read_events(run):
        if event["event"] == "forked":
            lines.append(
                f"Forked from step {event['step']:,} of {Path(event['from']).name} ({event['tokens']:,} tokens; its "
                f"weights have SHA-256 `{event['weights_sha256'][:16]}`)."
            )
        elif event["event"] == "extended":
            lines.append(
                f"Made longer at step {event['step']:,}: {event['from_tokens']:,} -> {event['to_tokens']:,} tokens."
            )
        elif event["event"] == "changed":
            keys = sorted({change.partition(":")[0].rpartition("/")[2] for change in event["changes"]})
            lines.append(f"Changed on the way: {', '.join(keys)}.")
    return "\n\n".join(lines)


def _validation_table(recipe: dict, evaluation: dict | None) -> str:
    if evaluation is None:
        return "Not measured: the run has no evaluation."
    rows = []
    for name, scores in _scores(recipe, evaluation):
        cells = [f"{scores[key]:.4f}" if scores.get(key) is not None else "not measured" for key in _SCORES[:3]]
        counts = [scores[key] if scores.get(key) is not None else "not measured" for key in _SCORES[3:]]
        rows.append((name or "all", *cells, *counts))
    table = _table(("Set", "Loss", "Perplexity", "Bits per byte", "Tokens", "Bytes"), rows)
    return (
        f"At step {evaluation['step']:,}, on text that was never trained on. Loss is in nats per predicted token; bits "
        f"per byte is the summed loss / ln 2 / UTF-8 bytes of those tokens: it compares across tokenizers.\n\n{table}"
    )


_SCORES = ("loss", "perplexity", "bits_per_byte", "num_tokens", "num_bytes")


def _scores(recipe: dict, evaluation: dict | None) -> list[tuple[str, dict[str, Any]]]:
    """(set name, its scores) for each validation set; with several, a last row named "" for all of them together."""
    if evaluation is None:
        return []
    names = [item["name"] for item in recipe["resolved"].get("validation") or []]
    whole = {key: evaluation.get(f"eval_{key}") for key in _SCORES}
    if len(names) < 2:
        return [(names[0] if names else "", whole)]
    each = [(name, {key: evaluation.get(f"eval_{name}_{key}") for key in _SCORES}) for name in names]
    return [(name, scores) for name, scores in each if scores["loss"] is not None] + [("", whole)]


def _limits() -> str:
    return (
        "A base model: it continues text and follows no instructions. It says false things in a confident voice and "
        "repeats what its data holds, biases and personal data included. Nothing but the numbers above was evaluated."
    )


def _tokens_seen(metrics: list[dict]) -> int:
    return max((record.get("tokens", 0) for record in metrics), default=0)


def _parameters(resolved: dict) -> str | None:
    count = resolved.get("num_parameters")
    return f"{count:,} ({count / 1e6:.2f} x 10^6, {count / 2**20:.2f} x 2^20)" if count else None


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A Markdown table; a row that holds a None is left out, integers get thousands separators."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        if all(cell is not None for cell in row):
            cells = [f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else str(cell) for cell in row]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
