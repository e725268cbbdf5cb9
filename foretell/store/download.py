"""One file from an http(s) or file URL to the disk: resumed, verified, then renamed into place.

While a download runs its bytes are in ``NAME.part`` and the server's validator (ETag or Last-Modified) in
``NAME.part.from``, so that whatever ends the process, the next run goes on from there and never mixes two
versions of a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit, urlunsplit

from foretell.errors import DownloadError, ModelNotFoundError
from foretell.store.cache import make_folder, publish, storage_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import httpx

_CHUNK_BYTES: Final = 1 << 20
_CONNECT_SECONDS, _READ_SECONDS = 15.0, 60.0
_MAX_PAGE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file to fetch. ``sha256`` None only where the source itself is trusted (a local index)."""

    url: str
    target: Path
    sha256: str | None
    label: str


def shown(url: str) -> str:
    """``url`` without the credentials it may carry, for messages."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment=""))


def fetch(wanted: Wanted, *, progress: bool = True) -> Path:
    """Downloads ``wanted`` unless it is there already, and returns its path.

    Raises DownloadError (wrong hash, HTTP error, cut connection, full disk) or ModelNotFoundError (404).
    The partial file is kept for the next run, except when its bytes were proved wrong.
    """
    if wanted.target.is_file():
        return wanted.target
    make_folder(wanted.target.parent)
    part = wanted.target.with_name(wanted.target.name + ".part")
    resumed = part.exists()
    try:
        with _progress(wanted.label, progress) as advance:
            digest = _to_part(wanted, part, advance)
        if wanted.sha256 is not None and digest != wanted.sha256:
            _discard(part)
            if not resumed:
                raise DownloadError(
                    f"{shown(wanted.url)} has sha256 {digest[:16]}…, not the promised {wanted.sha256[:16]}…: "
                    "the file was removed; run again, and if it persists do not trust that source"
                )
            return fetch(wanted, progress=progress)  # the kept part may have been the culprit: once from zero
        publish(part, wanted.target)
    except OSError as error:
        raise storage_error(error, wanted.target.parent, 0) from None
    _validator_file(part).unlink(missing_ok=True)
    return wanted.target


def read_page(url: str, accept: str) -> tuple[bytes, str, str]:
    """The body, content type and final URL of a small page. DownloadError or ModelNotFoundError on failure."""
    with (
        _client() as client,
        _http_errors(url),
        client.stream("GET", url, headers={"Accept": accept}) as response,
    ):
        _check_status(response, url)
        body = bytearray()
        for block in response.iter_bytes():
            body += block
            if len(body) > _MAX_PAGE_BYTES:
                raise DownloadError(
                    f"{shown(url)} sent more than {_MAX_PAGE_BYTES >> 20} MiB; is it a package index?"
                )
        return bytes(body), response.headers.get("content-type", ""), str(response.url)


def local_path(url: str) -> Path | None:
    """The path of a file:// URL, None for any other."""
    parts = urlsplit(url)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def _to_part(wanted: Wanted, part: Path, advance: Callable[[int, int | None], None]) -> str:
    """Brings ``part`` to its full length and returns its sha256."""
    source = local_path(wanted.url)
    if source is not None:
        try:
            reader = source.open("rb")
        except OSError as error:
            raise ModelNotFoundError(f"{source} cannot be read: {error.strerror}; check the index") from None
        with reader, part.open("wb") as out:
            return _copy(iter(lambda: reader.read(_CHUNK_BYTES), b""), out, source.stat().st_size, advance)
    with _client() as client, _http_errors(wanted.url):
        return _resume(client, wanted, part, advance)


def _resume(client: httpx.Client, wanted: Wanted, part: Path, advance: Callable[[int, int | None], None]) -> str:
    have = part.stat().st_size if part.exists() else 0
    validator = _read_validator(part)
    headers = {"Accept-Encoding": "identity"}  # a resumed offset counts stored bytes, not decoded ones
    if have and (validator or wanted.sha256):
        headers["Range"] = f"bytes={have}-"
        if validator:
            headers["If-Range"] = validator
    with client.stream("GET", wanted.url, headers=headers) as response:
        if response.status_code == 416 and have:  # nothing left after our offset, or another file by now
            total = response.headers.get("content-range", "").rpartition("/")[2]
            if total == str(have):
                return _hash_of(part)
            _discard(part)
            raise DownloadError(f"{shown(wanted.url)} changed since its download began; run again to fetch it anew")
        _check_status(response, wanted.url)
        start = have if response.status_code == 206 and _starts_at(response, have) else 0
        if start == 0:
            if response.status_code == 206:
                raise DownloadError(f"{shown(wanted.url)} answered with another part than asked for; run again")
            _write_validator(part, response)
        left = response.headers.get("content-length", "")
        total_bytes = start + int(left) if left.isdigit() else None
        with part.open("r+b" if start else "wb") as out:
            return _copy(response.iter_raw(), out, total_bytes, advance, start)


def _copy(
    blocks: Iterator[bytes],
    out: IO[bytes],
    total: int | None,
    advance: Callable[[int, int | None], None],
    start: int = 0,
) -> str:
    """Appends ``blocks`` behind byte ``start`` of ``out`` and returns the sha256 of the whole."""
    folder = Path(out.name).parent
    done = start
    if total is not None and shutil.disk_usage(folder).free < total - done:
        raise storage_error(OSError(28, "no space"), folder, total - done)
    digest = hashlib.sha256()
    while start > 0:
        block = out.read(min(_CHUNK_BYTES, start))
        digest.update(block)
        start -= len(block)
    advance(done, total)
    for block in blocks:
        digest.update(block)
        try:
            out.write(block)
        except OSError as error:
            raise storage_error(error, folder, (total or done + len(block)) - done) from None
        done += len(block)
        advance(done, total)
    if total is not None and done != total:
        raise DownloadError(
            f"{out.name} got {done} of {total} bytes before the connection ended; run again to resume"
        )
    return digest.hexdigest()


def _client() -> httpx.Client:
    import httpx

    timeout = httpx.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS)
    return httpx.Client(follow_redirects=True, timeout=timeout, headers={"User-Agent": "foretell"})


@contextlib.contextmanager
def _http_errors(url: str) -> Iterator[None]:
    import httpx

    try:
        yield
    except httpx.TimeoutException:
        raise DownloadError(f"{shown(url)} did not answer in time; run again (a partial download resumes)") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DownloadError(f"{shown(url)} failed: {why}; check the network and run again to resume") from None


def _check_status(response: httpx.Response, url: str) -> None:
    if urlsplit(url).scheme == "https" and response.url.scheme != "https":
        raise DownloadError(f"{shown(url)} redirects to unencrypted http; use another index")
    if response.status_code == 404:
        raise ModelNotFoundError(f"{shown(url)} does not exist (HTTP 404); check the name and the version")
    if response.status_code not in (200, 206):
        raise DownloadError(f"{shown(url)} answered HTTP {response.status_code}; try again later")


def _starts_at(response: httpx.Response, offset: int) -> bool:
    return bool(response.headers.get("content-range", "").startswith(f"bytes {offset}-"))


def _validator_file(part: Path) -> Path:
    return part.with_name(part.name + ".from")


def _read_validator(part: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        return _validator_file(part).read_text("ascii").strip()
    return ""


def _write_validator(part: Path, response: httpx.Response) -> None:
    etag = response.headers.get("etag", "")
    value = etag if etag and not etag.startswith("W/") else response.headers.get("last-modified", "")
    _validator_file(part).write_text(value if value.isascii() else "", "ascii")


def _hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _validator_file(part).unlink(missing_ok=True)


@contextlib.contextmanager
def _progress(label: str, show: bool) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on stderr with bytes, speed and time left; yields ``advance(done, total)``, in bytes."""
    if not show or os.environ.get("TERM") == "dumb":
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), DownloadColumn()]
    bar = Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True))
    with bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
