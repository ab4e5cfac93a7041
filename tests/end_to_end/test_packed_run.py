"""Training on packed and padded blocks: the loss is that of the documents' tokens, found by length and never by id."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from clm.__main__ import main as clm
from clm.reload import reload_run
from clm.replay import open_replay
from data_prep.__main__ import main as data_prep
from data_prep.blocks import Blocks
from data_prep.errors import UserError
from data_prep.token_bytes import token_byte_lengths

from .conftest import losses, quiet_config, read_metrics

SIZE = 64
SHORT = ("data.tokens=3072", "training.per_device_train_batch_size=2")  # 6 steps of 4 micro-batches of 2 rows


@pytest.fixture(scope="session")
def packed(prepared, tmp_path_factory, worker_id) -> dict[str, Path]:
    """Packing -> the short documents of the tiny corpus in blocks of 64; the tokenizer pads with its EOS."""
    base = tmp_path_factory.getbasetemp()
    root = (base if worker_id == "master" else base.parent) / "packed"
    folders = {packing: root / packing.replace("_", "-") for packing in ("concat", "best_fit", "pad")}
    with FileLock(f"{root}.lock"):
        if not root.exists():
            shutil.copytree(prepared.tokenizer, root / "tokenizer")
            config = root / "tokenizer" / "tokenizer_config.json"
            config.write_text(json.dumps({**json.loads(config.read_text()), "pad_token": "[EOT]"}))
            options = ["--tokenizer", root / "tokenizer", "--block-size", SIZE, "--val-fraction", 0.1, "--num-proc", 1]
            for packing, folder in folders.items():
                arguments = ["prep", prepared.corpus / "pages.jsonl", *options, "--packing", packing, "--out", folder]
                assert data_prep([str(each) for each in arguments]) == 0
    return folders


def on(folder: Path, tokens: int = 3200) -> list[str]:
    """Overrides of the recipe that train and evaluate on a dataset."""
    validation = f"data.validation=[{{dataset: {folder}, tokens: {tokens}}}]"
    return [f"data.mixture=[{{dataset: {folder}, weight: 1.0}}]", validation, f"data.block_size={SIZE}"]


def by_hand(model_folder: Path, rows: list[tuple[list[int], int]], is_masked: bool = False) -> tuple[float, list[int]]:
    """Summed NLL and the targets, one row of (tokens, length) after the other, each run without its padding.

    Nothing is padded or masked here, so nothing can be confused with padding; `is_masked` runs each document alone.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    eos = model.config.eos_token_id
    total, targets = 0.0, []
    for tokens, length in rows:
        parts = [tokens[:length]]
        if is_masked:
            ends = [i + 1 for i, token in enumerate(parts[0]) if token == eos]
            borders = sorted({0, *ends, length})
            parts = [tokens[a:b] for a, b in zip(borders, borders[1:], strict=False)]
        for part in parts:
            if len(part) > 1:
                with torch.no_grad():
                    logits = model(torch.tensor([part])).logits[0].double()
                total -= logits.log_softmax(-1)[torch.arange(len(part) - 1), torch.tensor(part[1:])].sum().item()
                targets += part[1:]
    return total, targets


def rows_of(blocks: Blocks, numbers) -> list[tuple[list[int], int]]:
    lengths = np.load(blocks.folder / blocks.split / "lengths.npy")
    tokens = np.concatenate([blocks.shard_tokens(s) for s in range(len(blocks.shard_starts) - 1)])
    return [(tokens.reshape(-1, SIZE)[n].tolist(), int(lengths[n])) for n in numbers]


@pytest.mark.parametrize(
    "packing, more",
    [
        ("pad", ()),
        pytest.param("best_fit", (), marks=pytest.mark.slow),
        pytest.param("pad", ("data.document_mask=true",), marks=pytest.mark.slow),
        pytest.param("best_fit", ("data.document_mask=true",), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_loss_of_a_run_is_the_loss_by_hand(train, recipe, packed, packing, more, capsys):
    from transformers import AutoTokenizer

    run = train(*on(packed[packing]), quiet_config(recipe), *SHORT, *more)
    split, is_masked = Blocks(packed[packing], "train"), bool(more)
    tokenizer = split.manifest.tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == split.fill_token_id
    replay = open_replay(run)
    _, _, numbers = replay.blocks_of_step(6)
    rows = rows_of(split, numbers)
    num_padded = sum(length < SIZE for _, length in rows)
    assert len(rows) == 8 and (packing != "pad" or num_padded > 1)
    nll, targets = by_hand(run / "checkpoint-5", rows, is_masked)
    assert tokenizer.eos_token_id in targets, "a document's end is a target though padding has the same id"
    assert losses(run)[6] == pytest.approx(nll / len(targets), rel=2e-5)

    validation = Blocks(packed[packing], "validation")
    nll, targets = by_hand(run / "final", rows_of(validation, range(3200 // SIZE)), is_masked)
    evaluation = [record for record in read_metrics(run) if "eval_loss" in record][-1]
    assert evaluation["eval_num_tokens"] == len(targets)
    assert evaluation["eval_loss"] == pytest.approx(nll / len(targets), rel=1e-5)
    lengths = token_byte_lengths(AutoTokenizer.from_pretrained(packed[packing] / "tokenizer"))
    assert evaluation["eval_num_bytes"] == lengths[targets].sum()
    assert evaluation["eval_bits_per_byte"] == pytest.approx(nll / np.log(2) / lengths[targets].sum(), rel=1e-5)
    capsys.readouterr()
    assert reload_run(str(run)) == 0
    assert f"({len(targets):,} tokens, fp32)" in capsys.readouterr().out

    assert "% of them padding" in (run / "final" / "README.md").read_text()
    assert clm(["explain", str(run), "--step", "6", "--checkpoint", "5"]) == 0
    explained = capsys.readouterr().out
    assert f"nats on average over {len(by_hand(run / 'checkpoint-5', rows, is_masked)[1])} targets" in explained
    assert explained.count("tokens of padding") == num_padded


@pytest.mark.slow
def test_micro_batches_with_other_numbers_of_targets_give_the_same_run(train, recipe, packed):
    more = (*on(packed["pad"]), quiet_config(recipe), "data.tokens=2560")
    runs = [train(*more, f"training.per_device_train_batch_size={rows}", name=f"of-{rows}") for rows in (8, 1)]
    assert np.allclose(*(list(losses(run).values()) for run in runs), rtol=1e-5)


@pytest.mark.slow
def test_a_mixture_of_packings_is_trained_and_resumed(train, recipe, packed, capsys):
    items = [f"{{dataset: {packed[packing]}, weight: 1.0}}" for packing in ("concat", "best_fit")]
    more = (
        f"data.mixture=[{', '.join(items)}]",
        f"data.validation=[{{dataset: {packed['pad']}}}]",
        "data.tokens=5120",
        "data.block_size=64",
    )
    whole, again = train(*more, name="whole"), train(*more, name="again")
    printed = capsys.readouterr().out
    assert "% of them padding (best_fit)" in printed and "of the run's tokens are text" in printed
    (again / "final").rename(again / "gone")
    (again / "checkpoint-10").rename(again / "gone-10")
    train(*more, name="again")
    assert losses(whole) == losses(again)


@pytest.mark.parametrize(
    "more", [["data.block_size=32"], ["data.stages=[{tokens: 2560, block_size: 32}, {tokens: 2560}]"]]
)
def test_shorter_rows_are_refused_with_the_remedy(train, packed, more):
    if "stages" in more[0]:
        more = [*more, "data.tokens=null"]
    with pytest.raises(UserError) as error:
        train(*on(packed["best_fit"]), *more)
    message = str(error.value)
    assert f"block_size is 32 but the stage trains on {packed['best_fit']}" in message
    assert "packed into blocks of 64 (packing best_fit)" in message
    assert "with --block-size 32 or --packing concat" in message
    assert not (Path(os.environ["RUNS_DIR"]) / "tiny").exists()
    if "stages" not in more[0]:
        with pytest.raises(UserError, match=r"data.validation\[0\].*packed into blocks of 64 \(packing pad\)"):
            train(*on(packed["concat"])[:1], on(packed["pad"])[1], *more)


def test_targets_are_not_drawn_from_padding(train, packed):
    with pytest.raises(UserError, match="data.permute_labels would draw targets from"):
        train(*on(packed["pad"]), "data.permute_labels=true")


def test_the_compressors_of_the_yardstick_see_no_padding(packed, prepared):
    from transformers import AutoTokenizer

    from clm.yardstick import held_out_text

    tokenizer = AutoTokenizer.from_pretrained(packed["pad"] / "tokenizer")
    texts = {p: held_out_text(folder, 10**6, tokenizer) for p, folder in packed.items()}
    assert texts["concat"] == texts["pad"][: len(texts["concat"])] and len(texts["best_fit"]) == len(texts["pad"])


def test_lengths_that_are_missing_end_the_run_before_it_begins(train, packed, tmp_path):
    copy = Path(shutil.copytree(packed["pad"], tmp_path / "copy"))
    (copy / "train" / "lengths.npy").unlink()
    with pytest.raises(
        UserError, match=r"lengths.npy is missing or damaged.*Without it padding cannot be told from text"
    ):
        train(*on(copy))


def test_a_recipe_has_a_packed_dataset_prepared_at_its_own_row_length(recipe, monkeypatch, tmp_path):
    from clm.prepare import prep_commands
    from clm.recipe import load_recipe

    monkeypatch.setattr("data_prep.catalog.FOLDER", tmp_path)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    entry = "description: x\nlicence: x\nsource_of_numbers: x\nrepository: a/b\ndefault_tokenizer: gpt2\n"
    for name, packing in (("listed-concat", "concat"), ("listed-packed", "best_fit")):
        (tmp_path / f"{name}.yaml").write_text(f"{entry}default_block_size: 128\npacking: {packing}\n")
    items = "[{dataset: listed-concat}, {dataset: listed-packed}]"
    commands = prep_commands(load_recipe(recipe, [f"data.mixture={items}", "data.validation=[]"]))
    assert [command[:4] for command in commands] == [
        ["prep", "listed-concat", "--block-size", "128"],
        ["prep", "listed-packed", "--block-size", "32"],
    ]
