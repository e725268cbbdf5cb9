"""From what a user types to files: folders, files, aliases, hub ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from foretell.errors import DownloadError, ForetellError, ModelFormatError, ModelNotFoundError
from foretell.store import ALIASES, DEFAULT_MODEL, cached_models, hub, open_tensors, resolve
from foretell.store.cache import cache_home, is_offline


def folder(tmp_path: Path, **files: Any) -> Path:
    for name, content in files.items():
        path = tmp_path / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path


def test_a_safetensors_folder(tmp_path: Path) -> None:
    folder(tmp_path, config__json={"model_type": "llama"}, generation_config__json={"eos_token_id": 2})
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    files = resolve(str(tmp_path))
    assert (files.format, files.path, files.name) == ("safetensors", tmp_path, tmp_path.name)
    assert files.config == {"model_type": "llama"}
    assert files.generation_config == {"eos_token_id": 2}
    assert files.size_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert open_tensors(files).names() == ["w"]


def test_a_bare_configuration(tmp_path: Path) -> None:
    files = resolve(str(folder(tmp_path, config__json={"a": 1})))
    assert (files.format, files.files, files.size_bytes) == ("none", (), 0)
    with pytest.raises(ModelNotFoundError, match="dummy"):
        open_tensors(files)


def test_a_gguf_file_and_a_folder_with_one(tmp_path: Path) -> None:
    folder(tmp_path, m__gguf="GGUF")
    direct, inside = resolve(str(tmp_path / "m.gguf")), resolve(str(tmp_path))
    assert direct.path == inside.path == tmp_path / "m.gguf"
    assert direct.format == inside.format == "gguf"
    assert direct.name == inside.name == "m"
    assert direct.folder == tmp_path
    with pytest.raises(ModelFormatError):
        open_tensors(direct)
    folder(tmp_path, n__gguf="GGUF")
    with pytest.raises(ModelNotFoundError, match=r"m\.gguf, n\.gguf"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.pth", "x.pkl", "x.ckpt"])
def test_pickles_are_never_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    folder(tmp_path, config__json={})
    for reference in (tmp_path, tmp_path / name):
        with pytest.raises(ModelFormatError, match=rf"{name}.*pickles are never read; convert it to safetensors"):
            resolve(str(reference))


def test_pickles_beside_safetensors_are_ignored(tmp_path: Path) -> None:
    (folder(tmp_path, config__json={}) / "training_args.bin").write_bytes(b"\x80")
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    assert resolve(str(tmp_path)).format == "safetensors"


@pytest.mark.parametrize("content", ["{", "[]", "nul", "[" * 100_000, "\udcff"])
def test_a_broken_configuration(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelFormatError, match=r"config\.json"):
        resolve(str(tmp_path))


@pytest.mark.parametrize(
    "reference",
    ["", "  ", "nonsense", "./none", "/none/at/all", "none.gguf", "pypi:", "pypi:../../x==1", "a\0b", "a/../b",
     "../a/b", "org/name@../../x", "org/name:../x.gguf", "org/name:x.bin", "org/na me",
     "org/name/more", "~/none-at-all", "~no-such-user/model", "/" + "x" * 5000, "x" * 5000],
)  # fmt: skip
def test_what_names_nothing(tmp_path: Path, reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(reference, offline=True, cache_dir=tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        resolve(str(tmp_path))
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        resolve(str(tmp_path))


def test_aliases_are_pinned() -> None:
    assert DEFAULT_MODEL in ALIASES
    for name, alias in ALIASES.items():
        assert alias.name == name
        assert all(len(value) == 64 for value in (*alias.wheel_sha256.values(), alias.file_sha256))
        assert alias.file_bytes > alias.download_bytes > 0


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORETELL_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_home() == Path.home() / ".cache" / "foretell"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_home() == tmp_path / "xdg" / "foretell"
    monkeypatch.setenv("FORETELL_HOME", str(tmp_path / "home"))
    assert cache_home() == tmp_path / "home"
    assert cache_home(tmp_path) == tmp_path
    assert cached_models() == []


def test_offline_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORETELL_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    assert not is_offline()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert is_offline()
    assert not is_offline(False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert not is_offline()


def test_an_unwritable_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DownloadError, match="FORETELL_HOME"):
        resolve(DEFAULT_MODEL, cache_dir=tmp_path / "file", progress=False)


# --- the hub, through the real client against its own cache layout -----------------------------------------


def cached_repository(cache: Path) -> Path:
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = cache / "hub" / "models--org--name"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    return snapshot


def test_a_cached_repository_needs_no_network(tmp_path: Path) -> None:
    snapshot = folder(cached_repository(tmp_path), config__json={"model_type": "llama"}, q__gguf="GGUF")
    save_file({"w": torch.ones(2)}, snapshot / "model.safetensors")
    files = resolve("org/name", offline=True, cache_dir=tmp_path)
    assert (files.name, files.format, files.path.resolve()) == ("org/name", "safetensors", snapshot.resolve())
    assert resolve("org/name@main", offline=True, cache_dir=tmp_path).path == files.path
    assert resolve("org/name:q.gguf", offline=True, cache_dir=tmp_path).format == "gguf"


def test_what_the_hub_cache_lacks(tmp_path: Path) -> None:
    snapshot = folder(cached_repository(tmp_path), config__json={})
    for reference in ("org/name", "org/other", "org/name@v2", "org/name:x.gguf"):
        with pytest.raises(ModelNotFoundError, match="offline"):
            resolve(reference, offline=True, cache_dir=tmp_path)
    save_file({"w": torch.ones(2)}, snapshot / "model-1.safetensors")
    index = {"weight_map": {"w": "model-1.safetensors", "v": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelNotFoundError, match="not complete"):
        resolve("org/name", offline=True, cache_dir=tmp_path)


def test_a_hub_out_of_reach_leaves_what_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = folder(cached_repository(tmp_path), config__json={})
    save_file({"w": torch.ones(2)}, snapshot / "model.safetensors")

    def unreachable(*_: Any, local_files_only: bool, **options: Any) -> str:
        if not local_files_only:
            raise OSError("no route to host")
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    assert resolve("org/name", offline=False, cache_dir=tmp_path).path == snapshot


def test_only_weights_and_configuration_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fnmatch

    asked: list[dict[str, Any]] = []

    def snapshot(repo: str, **options: Any) -> str:
        asked.append(options)
        save_file({"w": torch.ones(2)}, folder(tmp_path, config__json={}) / "model.safetensors")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert resolve("org/name@abc", offline=False, cache_dir=tmp_path).format == "safetensors"
    assert [(options["local_files_only"], options["revision"]) for options in asked] == [(False, "abc")]
    allowed = [
        name
        for name in ("model-1.safetensors", "config.json", "tokenizer.json", "chat_template.jinja",
                     "additional_chat_templates/tool_use.jinja", "pytorch_model.bin", "model.pt", "modeling_x.py",
                     "x.gguf", "x.pkl", "consolidated.safetensors", "original/model.safetensors", "onnx/config.json")
        if any(fnmatch.fnmatch(name, pattern) for pattern in asked[0]["allow_patterns"])
        and not any(fnmatch.fnmatch(name, pattern) for pattern in asked[0]["ignore_patterns"])
    ]  # fmt: skip
    assert allowed == ["model-1.safetensors", "config.json", "tokenizer.json", "chat_template.jinja",
                       "additional_chat_templates/tool_use.jinja"]  # fmt: skip


def test_hub_failures_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **options: Any) -> str:
        raise OSError("line one\nline two")

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    with pytest.raises(ForetellError) as caught:
        hub.fetch_repository("org/name", tmp_path, offline=False)
    assert "\n" not in str(caught.value)
