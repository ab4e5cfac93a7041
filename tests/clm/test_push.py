import pytest
from hub_stand_in import HubStandIn


@pytest.fixture
def push(run_cli, tmp_path):
    """`python -m clm push` in a process of its own: huggingface_hub reads its settings when it is imported."""

    def push_to(run, hub_url, *options, token=HubStandIn.TOKEN, **environment):
        settings = {"HF_ENDPOINT": hub_url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": token}
        settings |= {"HF_HOME": str(tmp_path / "hf_home"), **environment}
        return run_cli(["-m", "clm", "push", run, *options], env=settings, timeout_s=60)

    return push_to


@pytest.fixture
def pushable(run_copy):
    (run_copy / "final" / "README.md").write_text("---\nlicense: mit\n---\n# small\n")
    return run_copy


def test_the_hub_receives_every_byte_of_final(pushable, push):
    with HubStandIn() as hub:
        done = push(pushable, hub.url, "--repo-id", "somebody/small", "--private")
        assert done.code == 0, done.stderr
        assert f"{hub.url}/somebody/small/commit/" in done.stdout
        assert hub.files("somebody/small") == {path.name: path.read_bytes() for path in (pushable / "final").iterdir()}
        assert hub.repositories["somebody/small"]["visibility"] == "private"


def test_a_second_push_goes_into_the_same_repository_and_a_revision_into_its_branch(pushable, push):
    with HubStandIn() as hub:
        assert push(pushable, hub.url, "--repo-id", "somebody/small").code == 0
        (pushable / "final" / "README.md").write_text("---\nlicense: mit\n---\n# better\n")
        done = push(pushable, hub.url, "--repo-id", "small", "--revision", "v2")
        assert done.code == 0, done.stderr
        assert b"better" in hub.files("somebody/small", "v2")["README.md"]
        assert b"better" not in hub.files("somebody/small", "main")["README.md"]


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "does not accept the token (401)"), (403, "may not write to somebody/small (403)"), (500, "answered 500")],
)
def test_a_refusal_is_one_sentence_with_its_remedy_and_without_the_token(pushable, push, status, words):
    with HubStandIn(refuse_with=status) as hub:
        done = push(pushable, hub.url, "--repo-id", "somebody/small")
    assert done.code == 2 and words in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert HubStandIn.TOKEN not in done.stdout + done.stderr


def test_no_network_no_token_and_offline_mode_are_said_as_such(pushable, push):
    with HubStandIn() as hub:
        closed = hub.url
    cases = [
        (push(pushable, closed, "--repo-id", "a/b"), "cannot be reached"),
        (push(pushable, closed, "--repo-id", "a/b", token=""), "No Hub token found"),
        (push(pushable, closed, "--repo-id", "a/b", HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set"),
        (push(pushable, closed, "--repo-id", "a/b/c"), "Write user/name"),
        (push(pushable, closed), "training.hub_model_id is not set"),
    ]
    for done, words in cases:
        assert done.code == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
