import json

import pytest
import torch

from clm.sample import default_prompts, encode_prompt, generate_samples, load_model
from data_prep.errors import UserError


@pytest.fixture(scope="module")
def loaded(small_run):
    return load_model(small_run)


def test_a_prompt_begins_as_a_document_does_and_an_empty_one_is_bos(loaded):
    _, tokenizer = loaded
    assert encode_prompt(tokenizer, "") == [tokenizer.bos_token_id]
    ids = encode_prompt(tokenizer, "The river")
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids[1:]) == "The river"


def test_the_same_seed_gives_the_same_text_whatever_the_other_prompts_are(loaded):
    both = generate_samples(*loaded, ["The river", "Every"], max_new_tokens=20, seed=3)
    assert generate_samples(*loaded, ["Every"], max_new_tokens=20, seed=3) == both[1:]
    assert generate_samples(*loaded, ["Every"], max_new_tokens=20, seed=4) != both[1:]
    assert both[0].startswith("The river") and len(both[0]) > len("The river")


def test_texts_of_one_prompt_lie_side_by_side_and_differ(loaded):
    texts = generate_samples(*loaded, ["The", "Every"], max_new_tokens=20, num_per_prompt=2)
    assert [text[:3] for text in texts] == ["The", "The", "Eve", "Eve"] and texts[0] != texts[1]


def test_sampling_leaves_the_training_mode_and_the_global_random_state_as_they_were(loaded):
    model, tokenizer = loaded
    model.train()
    before = torch.get_rng_state()
    generate_samples(model, tokenizer, ["The"], max_new_tokens=5)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    model.eval()


def test_temperature_0_is_the_likeliest_token_each_time(loaded):
    model, tokenizer = loaded
    (text,) = generate_samples(model, tokenizer, ["The river"], max_new_tokens=3, temperature=0)
    ids = encode_prompt(tokenizer, "The river")
    for _ in range(3):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    assert text == tokenizer.decode(ids, skip_special_tokens=True)


def test_what_cannot_be_done_is_refused_with_a_remedy(loaded):
    with pytest.raises(UserError, match="128 positions. Ask for at most 127 new tokens"):
        generate_samples(*loaded, [""], max_new_tokens=128)
    with pytest.raises(UserError, match="temperature is 0, which always gives the same text"):
        generate_samples(*loaded, [""], temperature=0, num_per_prompt=2)


def test_prompts_come_from_the_recipe_else_the_model_begins_a_document(run_copy):
    assert default_prompts(run_copy) == ["The river", "Every reader"]
    (run_copy / "recipe.yaml").write_text(json.dumps({"run": {}}))
    assert default_prompts(run_copy) == [""]
