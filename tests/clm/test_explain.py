"""explain: the batch of a step, its documents and its text; as a table, as text and as one HTML file."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from clm.__main__ import main
from clm.block_text import BlockText
from clm.dataset import TrainBlocks
from clm.events import append_event
from clm.explain import choose_weights, explain_block, explain_step, open_text, write_step_report
from data_prep.errors import UserError

# --- which block, which process ---


def test_samples_are_dealt_to_the_processes_micro_batch_by_micro_batch(started):
    run = started("training.per_device_train_batch_size=4", num_processes=2)
    explanation = explain_step(open_text(run), 3, None)
    seen = [
        (block.seen_as["sample"], block.seen_as["rank"], block.seen_as["micro_batch"]) for block in explanation.blocks
    ]
    first = [(16, 0, 0), (17, 0, 0), (18, 1, 0), (19, 1, 0)]
    assert seen == [*first, (20, 0, 1), (21, 0, 1), (22, 1, 1), (23, 1, 1)]
    assert ("layout", "2 processes x 2 micro-batches x 4 rows of 32 tokens, as at the last start of the run") in (
        explanation.facts
    )


STAGES = (
    "data.stages=[{name: short, tokens: 4096, block_size: 16, tokens_per_step: 256},"
    " {name: long, tokens: 4096, schedule: {shape: linear, end: 0.1}}]"
)


def test_every_step_of_a_run_with_stages_and_a_rollback_shows_the_tokens_that_training_reads(started):
    run = started(STAGES, "data.tokens=null", "training.per_device_train_batch_size=4")
    append_event(run, {"event": "rollback", "step": 3, "last_step": 4, "to_step": 2, "excluded": [[8, 16]]})
    text, plan = open_text(run), started.plan.excluding(((8, 16),))
    for step in range(1, plan.num_steps + 1):
        stage = plan.timeline.stage_of_step(step)
        samples = plan.timeline.samples_of_step(step).tolist()
        rows = TrainBlocks(plan.splits, plan.order, stage.block_size, 0).__getitems__(samples)
        explanation = explain_step(text, step, None)
        assert explanation.block_size == stage.block_size == (16 if step <= 16 else 32)
        shown = np.concatenate([block.tokens[:-1] for block in explanation.blocks])
        assert np.array_equal(shown, rows.tokens[:, :-1].reshape(-1))
        assert [block.seen_as["sample"] for block in explanation.blocks] == samples
    assert "Rollbacks took 8 samples out of this run" in "\n".join(explanation.notes)
    dataset, block = plan.order.block_at(np.array([9]))
    assert text.describe_steps(int(dataset[0]), int(block[0])) == ["excluded by a rollback (sample 9)"]


def test_a_block_is_named_with_every_step_that_sees_it(started):
    run = started("data.tokens=200K", newest=60)  # about three passes
    text = open_text(run)
    steps = [step for _, step in text.steps_of(0, 5)]
    assert len(steps) in (3, 4) and all((0, 5) in blocks_of(text, step) for step in steps)
    sentences = text.describe_steps(0, 5)
    assert [sentence.startswith("seen at step") for sentence in sentences] == [step <= 60 for step in steps]
    explanation = explain_block(text, 0, 5, None)
    assert [value for _, value in explanation.facts[1:]] == sentences
    assert len(explanation.blocks) == 1 and explanation.blocks[0].block == 5


def blocks_of(text, step):
    _, datasets, blocks = text.replay.blocks_of_step(step)
    return list(zip(datasets.tolist(), blocks.tolist(), strict=True))


# --- losses ---


@pytest.mark.parametrize("masked", [False, True])
def test_losses_are_those_of_each_row_by_itself_and_of_each_document_where_they_are_masked(started, small_run, masked):
    import torch
    from transformers import AutoModelForCausalLM

    text = open_text(started(f"data.document_mask={str(masked).lower()}", newest=2))
    explanation = explain_step(text, 2, small_run / "final")
    model = AutoModelForCausalLM.from_pretrained(small_run / "final").double()
    for block in explanation.blocks:
        expected = []
        for row in range(0, 64, 32):
            ids, targets = block.tokens[row : row + 32].tolist(), block.tokens[row + 1 : row + 33].tolist()
            ends = [i + 1 for i, token in enumerate(ids[:-1]) if masked and token == 1]
            for begin, end in zip([0, *ends], [*ends, 32], strict=True):
                with torch.no_grad():
                    logp = model(torch.tensor([ids[begin:end]])).logits[0].log_softmax(-1)
                expected += [-logp[i, target].item() for i, target in enumerate(targets[begin:end])]
            expected[-32:] = [
                float("nan") if (masked and token == 1) or target < 0 else loss
                for loss, token, target in zip(expected[-32:], ids, targets, strict=True)
            ]
        np.testing.assert_allclose(block.losses, expected, rtol=1e-4)
    assert any("under final, 18 steps later; fp32" in value for name, value in explanation.facts if name == "losses")


def test_the_newest_checkpoint_up_to_the_step_is_taken_else_the_final_model_else_none(run_copy):
    shutil.copytree(run_copy / "checkpoint-10", run_copy / "checkpoint-4")
    assert choose_weights(run_copy, 7, None) == (run_copy / "checkpoint-4", [])
    assert choose_weights(run_copy, 10, None) == (run_copy / "checkpoint-10", [])
    assert choose_weights(run_copy, 3, None) == choose_weights(run_copy, None, None) == (run_copy / "final", [])
    assert choose_weights(run_copy, 3, "10") == (run_copy / "checkpoint-10", [])
    assert choose_weights(run_copy, 3, "none") == (None, [])
    with pytest.raises(UserError, match="no complete checkpoint of step 5. Complete checkpoints: 4, 10"):
        choose_weights(run_copy, 3, "5")
    shutil.rmtree(run_copy / "final")
    folder, (sentence,) = choose_weights(run_copy, 3, None)
    assert folder is None and sentence.startswith("No losses: the run has no checkpoint at or before step 3")


def test_a_control_run_has_no_losses_since_its_targets_are_no_text(started, small_run):
    explanation = explain_step(open_text(started("data.permute_labels=true")), 1, small_run / "final")
    assert explanation.blocks[0].losses is None and "permute_labels" in explanation.notes[-1]


# --- command line and mistakes ---


def explain(run, *arguments):
    return main(["explain", str(run), *map(str, arguments)])


def test_a_step_and_a_block_are_printed_and_written(started, small_run, capsys):
    run = started(newest=2)
    shutil.copytree(small_run / "final", run / "checkpoint-1")
    (run / "checkpoint-1" / "checkpoint.json").write_text("{}")
    assert explain(run, "--step", 2, "--max-rows", 1) == 0
    out = capsys.readouterr().out
    assert "under checkpoint-1, 1 step before it" in out and "15 more rows are not printed" in out
    assert out.endswith(f"HTML: {run}/explain/step-2.html\n") and (run / "explain" / "step-2.html").is_file()
    assert explain(run, "--block", "tiny:3", "--checkpoint", "none", "--out", run / "b.html") == 0
    assert "block  tiny:3" in capsys.readouterr().out and (run / "b.html").is_file()


def test_a_search_names_document_block_and_steps_seen_first(started, capsys):
    run = started("data.tokens=200K", newest=60)
    assert explain(run, "--grep", "It ends with [EOT] and") in (0, 1)
    capsys.readouterr()
    assert explain(run, "--grep", "map of 東京", "--limit", 2) == 0
    out = capsys.readouterr().out
    head, first, second, more = out.rstrip("\n").split("\n\n")
    assert re.match(
        r"'map of 東京': [\d,]+ times, in [\d,]+ blocks, in 153 kB of text \(tiny; [\d.]+ s, [\d,]+ MB/s\)", head
    )
    for place in (first, second):
        where, document, *steps = place.split("\n")
        assert re.match(r"tiny:\d+, token \d+: .*map of 東京", where)
        assert re.match(r"  corpus/(chapter_\d.txt|pages.jsonl), record [\d]+, from byte [\d,]+", document)
        assert steps[0].startswith("  ") and "seen at step 1 " in steps[0]
        assert any("will be seen at step" in step for step in steps)
    assert more.endswith("more are not printed: --limit " + more.split()[-1])
    assert explain(run, "--token", "[EOT]", "--limit", 1) == 0
    assert capsys.readouterr().out.startswith("token 1 ([EOT]): ")
    assert explain(run, "--grep", "no such text") == 1
    assert "'no such text': not found in 153 kB of text (tiny;" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "21"], "the run has 20 steps but --step is 21. Name one of 1 to 20."),
        (["--block", "tin:1"], "this run has no dataset 'tin'. Did you mean tiny?"),
        (["--block", "tiny:99999"], "has the blocks 0 to "),
        (["--token", "384"], "the vocabulary has the ids 0 to 383"),
        (["--token", "no token"], "no single token reads so. Look for the text with --grep instead."),
        (["--grep", ""], "--grep is empty"),
        (["--step", "1", "--limit", "3"], "--limit is given but says nothing about --step and --block. Leave it out."),
        (["--grep", "x", "--out", "y"], "--out is given but says nothing about --grep and --token. Leave it out."),
        (["--step", "1", "--checkpoint", "x"], "--checkpoint is 'x' but must be a step, final or none."),
    ],
)
def test_a_mistake_is_one_sentence_with_a_remedy(started, capsys, arguments, message):
    run = started()
    assert explain(run, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_data_that_is_gone_or_was_changed_is_named(started, two_documents):
    data, overrides = two_documents
    run = started(*overrides)
    moved = data.rename(data.with_name("moved"))
    with pytest.raises(UserError, match=f"{data}: this run was trained on it, and no prepared dataset is there now"):
        open_text(run)
    moved.rename(data)
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps({**manifest, "fingerprint": "0" * 64}))
    with pytest.raises(UserError, match=f"{data}: its content has changed since"):
        open_text(run)


def test_a_step_report_is_written_without_a_model(started, tmp_path):
    run = started(newest=3)
    explanation = write_step_report(run, 3, tmp_path / "spikes" / "step-3")
    assert all(isinstance(block, BlockText) and block.losses is None for block in explanation.blocks)
    assert sorted(path.name for path in (tmp_path / "spikes" / "step-3").iterdir()) == ["text.html", "text.txt"]
    text = Path(tmp_path / "spikes" / "step-3" / "text.txt").read_text()
    assert text.count("=== sample ") == 8 and "3 of 20: seen" in text
