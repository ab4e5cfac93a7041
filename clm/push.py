"""A run's final/ -> a model repository on the Hub.

In: a folder in Hub format and a repository id. Out: the commit's URL. What can go wrong (no token, a wrong one, no
right to write, offline, no network) ends in one sentence with its remedy; nothing is written locally, so a push can be
repeated.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from clm.run_folder import find_run, model_folder, read_recipe
from data_prep.errors import UserError

if TYPE_CHECKING:
    from clm.trainer import ClmTrainer

_TOKENS_PAGE = "https://huggingface.co/settings/tokens"


def push_folder(
    folder: Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload model",
    path_in_repo: str | None = None,
    ignore_patterns: list[str] | None = None,
) -> str:
    """Upload every file of `folder` and return the commit's URL.

    Args:
        repo_id: `user/name`, or `name` for the token's own user; made if it does not exist.
        private: only for a repository that is made now; None is the account's default.
        revision: branch; made if it does not exist.
        token: default is HF_TOKEN, else the one that `hf auth login` stored.
        path_in_repo: a folder there; None is the repository's root.
        ignore_patterns: files that are not sent, as globs.
    Raises:
        UserError: with what to do about it. The message never contains the token.
    """
    from huggingface_hub import HfApi, constants

    repo = create_repository(repo_id, private, token)
    api = HfApi(token=token)
    try:
        if revision and revision != constants.DEFAULT_REVISION:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            path_in_repo=path_in_repo,
            revision=revision,
            commit_message=commit_message,
            ignore_patterns=ignore_patterns,
        )
    except Exception as error:
        raise_explained(error, repo_id, api.endpoint)
        raise
    return commit.commit_url


def create_repository(repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Make the repository if it does not exist, and return its full id: what a push needs, found out before it.

    Raises:
        UserError: offline, no network, no token, one that may not write there, or a name that the Hub does not take.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError

    if constants.HF_HUB_OFFLINE:
        raise UserError(
            "HF_HUB_OFFLINE is set, so nothing can be pushed. "
            "Unset it: env -u HF_HUB_OFFLINE -u TRANSFORMERS_OFFLINE make push ..."
        )
    if not (token or get_token()):
        raise UserError(
            f"No Hub token found. Make one with the right to write ({_TOKENS_PAGE}), "
            "then: hf auth login, or export HF_TOKEN=..."
        )
    api = HfApi(token=token)
    try:
        return api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    except HFValidationError as error:
        raise UserError(
            f"The repository id is {repo_id!r}, which the Hub does not take: {error}. Write user/name."
        ) from None
    except Exception as error:
        raise_explained(error, repo_id, api.endpoint)
        raise


def raise_explained(error: Exception, repo_id: str, endpoint: str) -> None:
    """Raise a UserError that says what a failed request means; return where it is not the Hub's or the network's."""
    message = _explain(error, repo_id, endpoint)
    if message is not None:
        raise UserError(message) from error


def _explain(error: BaseException, repo_id: str, endpoint: str) -> str | None:
    """What a failed request means for the user; None for an error that is not the Hub's or the network's."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    while not isinstance(error, HfHubHTTPError) and error.__cause__ is not None:
        error = error.__cause__  # an upload thread wraps what happened to it
    if isinstance(error, OfflineModeIsEnabled):
        return "The Hub library is in offline mode. Unset HF_HUB_OFFLINE and push again."
    if not isinstance(error, HfHubHTTPError):
        # Which HTTP library raises depends on huggingface_hub's version (httpx, httpx2, requests); the names agree.
        is_network = isinstance(error, OSError) or any(
            word in type(error).__name__
            for word in ("Connect", "Timeout", "Network", "Protocol", "ReadError", "WriteError")
        )
        what = f"{type(error).__name__}: {error}"
        return (
            f"{endpoint} cannot be reached ({what}). Check the network or proxy, then push again."
            if is_network
            else None
        )
    status = error.response.status_code if error.response is not None else None
    if status == 401:
        return (
            f"The Hub does not accept the token (401). It may have expired: make a new one ({_TOKENS_PAGE}), "
            "then: hf auth login"
        )
    if status == 403:
        return (
            f"The token may not write to {repo_id} (403). It needs the write role and you need to be a member of that "
            f"namespace: {_TOKENS_PAGE}. Another name goes with --repo-id user/name"
        )
    if status == 404:
        return f"{repo_id} or its branch does not exist for this token (404). Check --repo-id and --revision."
    if status == 429 or (status or 0) >= 500:
        return f"The Hub answered {status}, which is not about you or the model. Push again later."
    return f"The Hub refused the upload to {repo_id} ({status}): {str(error).splitlines()[-1]}"


def push_run(name: str, repo_id: str | None, private: bool | None, revision: str | None) -> None:
    """`python -m clm push`: push a run's final model; what is not given comes from the recipe's training.hub_* keys."""
    run = find_run(name)
    training = read_recipe(run).get("training") or {}
    folder = model_folder(run)
    repo_id = repo_id or training.get("hub_model_id")
    if not repo_id:
        raise UserError(
            f"{run / 'recipe.yaml'}: training.hub_model_id is not set, so it is not known where to push. "
            f"Say it: python -m clm push {name} --repo-id user/{run.resolve().name}"
        )
    if not (folder / "README.md").is_file():
        raise UserError(f"{folder}: has no model card. Write it first: python -m clm card {name}")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"pushing {folder} ({size / 1e6:,.1f} MB) to {repo_id}", flush=True)
    private = training.get("hub_private_repo") if private is None else private
    url = push_folder(folder, repo_id, private, revision or training.get("hub_revision"))
    print(url)


def push_checkpoint(trainer: ClmTrainer, folder: Path, facts: dict[str, Any]) -> None:
    """Push a finished checkpoint as hub_strategy says. A failing push is reported and never ends the training."""
    from clm.checkpoint import RESUME_ONLY
    from clm.metrics import log

    args = trainer.args
    strategy = str(getattr(args.hub_strategy, "value", args.hub_strategy))
    where = {"every_save": None, "checkpoint": "last-checkpoint", "all_checkpoints": folder.name}
    if strategy not in where:
        return  # "end": only final/ is pushed
    try:
        push_folder(
            folder,
            trainer.hub_model_id,
            private=args.hub_private_repo,
            revision=args.hub_revision,
            commit_message=f"Step {facts['step']}, {facts['tokens']} tokens",
            path_in_repo=where[strategy],
            ignore_patterns=list(RESUME_ONLY) if strategy == "every_save" else None,
        )
    except UserError as error:
        log.warning("The push of %s failed, training goes on: %s", folder, error)


def push_final(trainer: ClmTrainer, final: Path) -> None:
    """Push final/ at the end of a run; a failing push names the command that repeats it."""
    from clm.metrics import log

    args = trainer.args
    try:
        url = push_folder(final, trainer.hub_model_id, private=args.hub_private_repo, revision=args.hub_revision)
        log.info("pushed to %s", url)
    except UserError as error:
        log.warning("The push failed: %s\nPush it later: make push RUN=%s", error, trainer.plan.recipe.name)
