"""Publish a checkpoint on the Hub: verify it, show what would be uploaded, and upload it in one commit."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from torch import Tensor

from parameternet import weights
from parameternet.hub.card_data import COMPARISONS, describe
from parameternet.hub.card_text import write_card
from parameternet.models import loading
from parameternet.models.builder import public_config
from parameternet.prediction import Predictor
from parameternet.text import without_local_paths

__all__ = ["File", "OtherWeights", "PublishError", "Published", "publish"]

CARD = "README.md"
# the training record, where it exists
_ALONG = (
    *("recipe.yaml", "history.csv", "curves.png", "routing.png", "init_recipe.yaml", "init_history.csv"),
    *(f"{name}.{kind}" for name in COMPARISONS for kind in ("md", "png")),
)


class PublishError(RuntimeError):
    """A checkpoint was not published; the message says why and how to fix it."""


class OtherWeights(PublishError):
    """The repository holds other weights already."""


@dataclass(frozen=True)
class File:
    """A file of the checkpoint, and its state compared with the repository: "new", "changed" or "same"."""

    path: str
    bytes: int
    state: str


@dataclass(frozen=True)
class Published:
    """The result of `publish`; `commit` is the URL of the commit, or None if nothing was committed."""

    repository: str
    files: tuple[File, ...]
    commit: str | None = None

    @property
    def replaces_weights(self) -> bool:
        """Return whether this would replace different weights in the repository."""
        return any(file.path == weights.FILE_NAME and file.state == "changed" for file in self.files)


def publish(
    source: str | Path,
    repo_id: str,
    revision: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    private: bool = False,
    token: str | None = None,
) -> Published:
    """Upload a checkpoint to the Hub in one commit: card, config.json, model.safetensors and training record.

    Creates the repository if it does not exist. Uploads only files that differ, and commits nothing if none does. A
    hand-written README.md is uploaded unchanged; otherwise the card is written for `repo_id`.

    Args:
        source: As for `parameternet.models.loading.parse_source`. Local paths are removed from the upload.
        repo_id: `ORG/NAME`.
        revision: The branch, created from main if it does not exist; None: main.
        dry_run: Only report what would be uploaded; needs no write access.
        overwrite: Replace other weights in the repository.
        private: Create a private repository.
        token: None: the stored token (`hf auth login` or HF_TOKEN).

    Raises:
        WeightsNotFound, WeightsDamaged: the local files are missing or damaged; nothing was uploaded.
        OtherWeights: the repository holds other weights, and `overwrite` is False.
        PublishError: the upload failed. At most an empty repository or branch was created, unless the connection
            broke after the commit; publish again to find out.
    """
    files = _read(source, repo_id)
    api = HfApi(token=token, library_name="parameternet")
    with _in_a_sentence(repo_id, token):
        head, there = _there(api, repo_id, revision, list(files))
    states = {path: _state(data, there.get(path)) for path, data in files.items()}
    planned = Published(repo_id, tuple(File(path, len(data), states[path]) for path, data in files.items()))
    changed = [path for path, state in states.items() if state != "same"]
    if dry_run or not changed:
        return planned
    if planned.replaces_weights and not overwrite:
        raise OtherWeights(
            f"{repo_id} holds other weights. To replace them: overwrite=True, or --yes; "
            "to keep them: another name, or another revision"
        )
    with _in_a_sentence(repo_id, token):
        if head is None:
            _make(api, repo_id, revision, private)
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(path, files[path]) for path in changed],
            commit_message=f"Publish {describe(source)[0]}",
            revision=revision,
            parent_commit=head or None,  # reject the commit if the branch has changed since
        )
    return Published(repo_id, planned.files, commit.commit_url)


def _read(source: str | Path, repo_id: str) -> dict[str, bytes]:
    """Return the files to upload, path -> content. Each is read once, so the verified bytes are the uploaded bytes."""
    name, config, folder = describe(source)
    found = loading.parse_source(source)
    if found.kind == "checkpoint" and folder is None:
        raise PublishError(
            f"{name} has no weights of its own: they are read from another repository of the Hub. "
            "`parameternet upcycle` makes a folder of them, which can be published"
        )
    Predictor(source, "cpu")  # raises if config, weights and class names do not match
    path, sha256 = loading.weights_file(found)
    files = {weights.CONFIG_NAME: _config(path, config), weights.FILE_NAME: path.read_bytes()}
    along = [folder / file for file in _ALONG] if folder else []
    files |= {path.name: _public_recipe(path) if path.suffix == ".yaml" else path.read_bytes() for path in along
              if path.is_file()}  # fmt: skip
    ours = found.kind == "checkpoint" or repo_id == f"{weights.hub()}/{name}"
    recorded = (weights.known().get(name, {}).get("sha256"),) if ours else sha256
    for digest in filter(None, (*recorded, hashlib.sha256(files[weights.FILE_NAME]).hexdigest())):
        tensors, words = weights.read_all(path, digest)
    files[weights.FILE_NAME] = _public_weights(files[weights.FILE_NAME], tensors, words)
    return {CARD: _card(source, folder, repo_id).encode(), **files}


def _config(file: Path, config: dict[str, Any]) -> bytes:
    """Return the config.json next to the weights unchanged, if it exists and contains no local path."""
    path = file.with_name(weights.CONFIG_NAME)
    if path.is_file():
        data = path.read_bytes()
        found = weights.parse_config(data, str(path))
        config = public_config(found)
        if config == found:
            return data
    return json.dumps(config, indent=2, ensure_ascii=False).encode()


def _public_recipe(path: Path) -> bytes:
    data = path.read_bytes()
    recipe = yaml.safe_load(data)
    cleaned = without_local_paths(recipe)
    return data if cleaned == recipe else yaml.safe_dump(cleaned, sort_keys=False, allow_unicode=True).encode()


def _public_weights(data: bytes, tensors: dict[str, Tensor], words: dict[str, str]) -> bytes:
    """Return the weights file unchanged, or rewritten if its header contains a local path."""
    cleaned = {key: without_local_paths(value) for key, value in words.items() if key != "config"}
    if "config" in words:
        config = weights.parse_config(words["config"], "the config in the header of the weights")
        public = public_config(config)
        cleaned["config"] = words["config"] if public == config else json.dumps(public)
    if cleaned == words:
        return data
    with tempfile.TemporaryDirectory() as private:
        weights.save(tensors, Path(private) / weights.FILE_NAME, cleaned)
        return (Path(private) / weights.FILE_NAME).read_bytes()


def _card(source: str | Path, folder: Path | None, repo_id: str) -> str:
    path = folder and folder / CARD
    by_hand = path.read_text("utf-8") if path and path.is_file() else None
    if by_hand and by_hand not in (write_card(source), write_card(folder)):
        return by_hand
    return write_card(source, f"hf-hub:{repo_id}")


def _there(api: HfApi, repo_id: str, revision: str | None, paths: list[str]) -> tuple[str | None, dict[str, Any]]:
    """Return (newest commit, path -> the Hub's file info); None if the repository or branch does not exist."""
    try:
        head = api.model_info(repo_id, revision=revision).sha or ""
        return head, {file.path: file for file in api.get_paths_info(repo_id, paths, revision=head or revision)}
    except RevisionNotFoundError:
        return None, {}
    except RepositoryNotFoundError as error:
        if type(error) is not RepositoryNotFoundError:  # gated
            raise
        return None, {}


def _state(data: bytes, there: Any) -> str:
    if there is None:
        return "new"
    return "changed" if weights.hub_damage(data, there.lfs.sha256 if there.lfs else there.blob_id) else "same"


def _make(api: HfApi, repo_id: str, revision: str | None, private: bool) -> None:
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision:
        api.create_branch(repo_id, branch=revision, exist_ok=True)


@contextmanager
def _in_a_sentence(repo_id: str, token: str | None) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # any error of the installed client's HTTP library
        raise PublishError(f"{repo_id}: {weights.hub_reason(error, token)}") from weights.hub_cause(error, token)
