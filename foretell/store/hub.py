"""Hugging Face repositories, through huggingface_hub: weights, configuration and tokenizer files, never code."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Final

from foretell.errors import DownloadError, ModelNotFoundError
from foretell.store.files import read_json

ALLOWED: Final = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
# The same weights a second time: in the publisher's own names, or in folders of other formats.
IGNORED: Final = ("consolidated*.safetensors", "*/*.safetensors", "*/*.json")
_REFERENCE: Final = re.compile(
    r"(?P<repo>[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)"
    r"(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]*))?(?::(?P<file>[A-Za-z0-9][A-Za-z0-9._/+-]*\.gguf))?"
)


def fetch_repository(reference: str, cache_dir: Path | None, *, offline: bool) -> tuple[Path, str]:
    """The local path of ``org/name[@revision][:file.gguf]`` (a folder, or the file) and the repository's id.

    Files go to huggingface_hub's own cache, so what other tools fetched is found; to ``cache_dir``/hub when
    one is given. Raises ModelNotFoundError or DownloadError.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None or ".." in reference:
        raise ModelNotFoundError(
            f"{reference[:80]!r} is no existing path and no Hugging Face id; write org/name, org/name@revision "
            "or org/name:file.gguf"
        )
    repo, revision, file = match["repo"], match["revision"], match["file"]
    folder = None if cache_dir is None else Path(cache_dir) / "hub"
    if offline:
        return _complete(_fetch(repo, revision, file, folder, offline=True), reference), repo
    try:
        return _fetch(repo, revision, file, folder, offline=False), repo
    except DownloadError:  # no network: what is here and whole will do
        with contextlib.suppress(ModelNotFoundError):
            return _complete(_fetch(repo, revision, file, folder, offline=True), reference), repo
        raise


def _fetch(repo: str, revision: str | None, file: str | None, folder: Path | None, *, offline: bool) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = repo + (f"@{revision}" if revision else "") + (f":{file}" if file else "")
    try:
        if file:
            found = hf_hub_download(repo, file, revision=revision, cache_dir=folder, local_files_only=offline)
        else:
            found = snapshot_download(
                repo,
                revision=revision,
                cache_dir=folder,
                local_files_only=offline,
                allow_patterns=list(ALLOWED),
                ignore_patterns=list(IGNORED),
            )
    except GatedRepoError:
        raise ModelNotFoundError(f"{what} is gated; accept its terms on the hub and set HF_TOKEN") from None
    except LocalEntryNotFoundError:
        if offline:
            raise ModelNotFoundError(f"{what} is not in the cache and foretell is offline; run once online") from None
        raise DownloadError(f"{what} cannot be fetched: the hub is not reachable; check the network") from None
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError, HFValidationError) as error:
        raise ModelNotFoundError(f"{what} is not on the hub ({type(error).__name__}); check the id") from None
    except Exception as error:  # the hub library raises its HTTP client's errors, whichever that is
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise DownloadError(f"{what} cannot be fetched: {why[:200]}; check the network and run again") from None
    return Path(found)


def _complete(path: Path, reference: str) -> Path:
    """A snapshot in the cache may be the torso of an interrupted download: ModelNotFoundError then."""
    if path.is_dir():
        weights = (read_json(path / "model.safetensors.index.json") or {}).get("weight_map")
        shards = set(weights.values()) if isinstance(weights, dict) else set()
        whole = all((path / str(shard)).is_file() for shard in shards) and any(path.glob("*.safetensors"))
        if not whole or not (path / "config.json").is_file():
            raise ModelNotFoundError(
                f"{reference} is not complete in the cache and foretell is offline; run once online"
            )
    return path
