"""Publish a checkpoint on the Hugging Face hub, with its card, report, recipe and manifest.

All files go up in one commit, so that nobody ever downloads half a model. Scores that `evaluate`
has kept stand in the card as results (the hub's `model-index`); the manifest is given the hash of
the card that goes up.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmslim.atomic import all_files
from llmslim.errors import CheckpointError
from llmslim.evaluation import Evaluation, read_evaluation
from llmslim.storage import CARD, HUB_ID, MANIFEST, first_line, relisted, verify_folder


@dataclass(frozen=True)
class Upload:
    """What goes to a repository of the hub."""

    repo: str
    """Its name, `owner/name`."""
    files: dict[str, Path | bytes]
    """Contents by path in the repository."""

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(
            len(each) if isinstance(each, bytes) else each.stat().st_size
            for each in self.files.values()
        )


def check_repo(repo: str) -> None:
    """Make sure that a name can be one on the hub.

    Raises:
        CheckpointError: if it cannot.
    """
    if not HUB_ID.fullmatch(repo):
        raise CheckpointError(f"{repo!r}: not a name on the hub; allowed is owner/name.")


def plan_upload(folder: Path, repo: str) -> Upload:
    """Return what pushing a checkpoint would upload.

    Args:
        folder: what `convert`, `heal`, `save` or `export_dense` wrote.
        repo: name on the hub, `owner/name`.

    Raises:
        CheckpointError: if the name is none, or the checkpoint is not whole.
    """
    check_repo(repo)
    found = verify_folder(folder)
    if not found.ok:
        raise CheckpointError(
            f"{folder}: is not as it was written: {found.problems[0]} "
            "Only a whole checkpoint is pushed; run llmslim verify."
        )
    paths = all_files(folder)
    files: dict[str, Path | bytes] = {p.relative_to(folder).as_posix(): p for p in paths}
    scores = read_evaluation(folder)
    if scores is not None and CARD in files:
        card = _with_results((folder / CARD).read_text(encoding="utf-8"), scores)
        files |= {CARD: card, MANIFEST: relisted(folder, CARD, card)}
    return Upload(repo, files)


def push(upload: Upload, *, private: bool = False, revision: str | None = None) -> str:
    """Upload files in one commit; the repository and the branch are made where needed.

    Args:
        upload: what `plan_upload` returned.
        private: whether a repository that is made is private.
        revision: branch; the main one by default.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: if the hub cannot be reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api, repo = HfApi(library_name="llmslim"), upload.repo
    operations = [CommitOperationAdd(name, content) for name, content in upload.files.items()]
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        done = api.create_commit(
            repo, operations, commit_message="Upload a model made by llmslim", revision=revision
        )
    except Exception as error:  # no login, no rights, proxies, timeouts, offline: many classes
        raise CheckpointError(
            f"{repo}: the hub could not be reached, or refused ({first_line(error)}). "
            "Check the name and the connection, and log in with `hf auth login`."
        ) from error
    return str(done.commit_url)


def _with_results(card: str, scores: Evaluation) -> bytes:
    """Return a card with scores in its front matter, as the hub reads them."""
    from huggingface_hub import EvalResult, ModelCard

    made = ModelCard(card, ignore_metadata_errors=True)
    found = [
        *(("text-generation", one.text, "perplexity", one.perplexity.mean) for one in scores.texts),
        *(("text-generation", one.task, one.metric, one.value) for one in scores.tasks),
    ]
    data: Any = made.data  # fields as the card has them
    data.model_name = scores.model
    data.eval_results = [
        EvalResult(task, name, name, metric, round(value, 4)) for task, name, metric, value in found
    ]
    return str(made).encode()
