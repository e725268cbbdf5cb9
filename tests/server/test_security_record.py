"""The field's security record and its users' pains, one test for each class of failure that a server can have."""

from __future__ import annotations

import ast
import asyncio
import json
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

import foretell
from foretell.errors import ConfigError, ModelFormatError
from foretell.server.config import ServerConfig
from foretell.server.local_engine import LocalTextEngine
from foretell.store import chat_limits
from tests.server.client import client_for, request, run
from tests.server.live import serving
from tests.server.tiny import TEMPLATE, start_tiny, write_model

SERVER = Path(foretell.__file__).parent / "server"
HELLO = [{"role": "user", "content": "Hello"}]


def completion(engine: LocalTextEngine, **body: Any) -> httpx.Response:
    return request(engine, "POST", "/v1/completions", json={"prompt": "Hello", "max_tokens": 2, **body})


def still_answers(engine: LocalTextEngine) -> bool:
    return completion(engine).status_code == 200 and request(engine, "GET", "/health").status_code == 200


class Exploit:
    def __reduce__(self) -> Any:
        return (Exploit.ran.append, (1,))

    ran: list[int] = []  # noqa: RUF012


def test_cve_2025_32444_cve_2026_3059_nothing_from_a_network_is_unpickled(tiny: LocalTextEngine) -> None:
    bomb = pickle.dumps(Exploit())
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/admin/policy"):
        for kind in ("application/json", "application/octet-stream", "application/x-python-pickle"):
            answer = request(tiny, "POST", path, content=bomb, headers={"content-type": kind})
            assert answer.status_code in (400, 403, 415)
    assert Exploit.ran == []
    for file in SERVER.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & {"pickle", "zmq", "marshal", "shelve", "dill"}, file


def test_cve_2026_22807_model_files_run_no_code(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoTokenizer": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    from foretell.async_llm import AsyncLLM

    engine = LocalTextEngine(AsyncLLM(str(folder), load_format="dummy", dtype="float32", kv_cache_bytes=1 << 20))
    try:
        assert still_answers(engine)
    finally:
        engine.close()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("counts", [(2**63 - 1, 1), (1, 2**63 - 1), (2**64 - 1, 2**64 - 1), (2**32, 0)])
def test_cve_2024_21802_cve_2025_53630_gguf_headers_do_not_overflow(tmp_path: Path, counts: tuple[int, int]) -> None:
    from foretell.store.gguf_header import read_header

    file = tmp_path / "evil.gguf"
    file.write_bytes(
        b"GGUF" + (3).to_bytes(4, "little") + b"".join(c.to_bytes(8, "little") for c in counts) + b"\0" * 64
    )
    with pytest.raises(ModelFormatError):
        read_header(file)


@pytest.mark.parametrize(
    "body",
    [
        {"chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}"},
        {"chat_template_kwargs": {"chat_template": "{{ 7 * 7 }}"}},
        {"chat_template_kwargs": {"messages": "x"}},
        {"chat_template_kwargs": {"bos_token": "x"}},
    ],
)
def test_cve_2026_5760_no_template_comes_with_a_request(tiny: LocalTextEngine, body: dict[str, Any]) -> None:
    for path in ("/v1/chat/completions", "/tokenize"):
        answer = request(tiny, "POST", path, json={"messages": HELLO, **body})
        assert answer.status_code == 400
        assert "chat_template" in answer.json()["error"]["message"]
        assert "49" not in answer.text


def test_cve_2025_62426_a_template_without_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A switch in the request turns the loop on; the others are served meanwhile and afterwards."""
    loop = "{% if spin %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    from foretell.async_llm import AsyncLLM

    monkeypatch.setattr(chat_limits, "MAX_CPU_SECONDS", 0.2)
    folder = write_model(tmp_path / "model", loop + TEMPLATE)
    engine = LocalTextEngine(AsyncLLM(str(folder), load_format="dummy", dtype="float32", kv_cache_bytes=1 << 20))
    try:
        body = {"messages": HELLO, "max_tokens": 2, "chat_template_kwargs": {"spin": True}}
        answer = request(engine, "POST", "/v1/chat/completions", json=body)
        assert answer.status_code == 400
        assert "chat template" in answer.json()["error"]["message"]
        assert still_answers(engine)
    finally:
        engine.close()


GRAMMARS = {
    "guided_regex": [
        "(((((((a{1,999}){1,999}){1,999}){1,999}){1,999}",
        "(a|a)*" * 3000,
        "x" * 100_000,
        "(?<=a)b",
        "[",
    ],
    "guided_grammar": ["x" * 100_000, 'root ::= root root root | ""', "start: start start", ""],
    "guided_choice": [["a"] * 50_000, [""], ["x" * 100_000]],
    "guided_json": [
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(20_000)}},
        json.loads('{"items":' * 60 + "{}" + "}" * 60),
        {"$ref": "http://127.0.0.1:9/schema.json"},
        {"$ref": "#"},
    ],
}


@pytest.mark.parametrize("field", GRAMMARS)
def test_cve_2025_29770_grammars_do_not_explode(tiny: LocalTextEngine, field: str) -> None:
    for value in GRAMMARS[field]:
        answer = completion(tiny, **{field: value})
        assert answer.status_code in (200, 400), answer.text
    assert still_answers(tiny)


PARTS = [
    {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}},
    {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    {"type": "video_url", "video_url": {"url": "http://169.254.169.254/"}},
    {"type": "file", "file": {"file_id": "f"}},
    {"type": "audio_url", "audio_url": {"url": "gopher://x"}},
]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part["type"])
def test_cve_2026_24779_nothing_is_ever_fetched(
    tiny: LocalTextEngine, part: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: reached.append(a) or [])
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: reached.append(address))
    answer = request(tiny, "POST", "/v1/chat/completions", json={"messages": [{"role": "user", "content": [part]}]})
    assert answer.status_code == 400
    assert part["type"] in answer.json()["error"]["message"]
    assert reached == []


HUGE = [2**31 - 1, 2**31, 2**63, 2**64, 10**39]


@pytest.mark.parametrize("field", ["n", "best_of", "logprobs", "prompt_logprobs", "min_tokens", "top_k", "priority"])
def test_cve_2026_34756_cve_2026_114051_huge_numbers_are_refused_and_health_is_true(
    tiny: LocalTextEngine, field: str
) -> None:
    for value in (*HUGE, *(-v for v in HUGE)):
        answer = completion(tiny, **{field: value})
        allowed = field in ("top_k", "priority") and abs(value) <= 2**31  # these may be that large
        assert answer.status_code in ((200, 400) if allowed else (400,)), (value, answer.text)
    assert still_answers(tiny)


def test_cve_2026_112266_one_clients_id_ends_no_others_request(tiny: LocalTextEngine) -> None:
    """Two requests with one X-Request-Id: the first client leaves, the second gets its answer whole."""
    headers = {"x-request-id": "the-same", "x-client-request-id": "the-same"}
    body = {"prompt": "Hello", "max_tokens": 200, "ignore_eos": True, "temperature": 0}

    async def go(base: str) -> Any:
        async with httpx.AsyncClient(base_url=base, headers=headers, timeout=60) as client:
            kept = asyncio.create_task(client.post("/v1/completions", json=body))
            async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as leaving:
                async for _ in leaving.aiter_lines():
                    break
            return (await kept).json()

    with serving(tiny) as base:
        assert run(go(base))["usage"]["completion_tokens"] == 200
    for path in ("/v1/completions", "/v1/chat/completions"):
        named = request(tiny, "POST", path, json={"prompt": "x", "messages": HELLO, "request_id": "mine"})
        assert named.status_code == 400


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "203.0.113.7"])
def test_no_interface_is_opened_without_a_key(host: str) -> None:
    assert ServerConfig().host == "127.0.0.1"
    with pytest.raises(ConfigError, match="without a key"):
        ServerConfig(host=host)


def test_checks_do_not_depend_on_asserts() -> None:
    """``python -O`` strips asserts: there are none in the server, and a server under -O refuses the same."""
    for file in SERVER.rglob("*.py"):
        assert not [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Assert)], file
    done = subprocess.run([sys.executable, "-O", "-c", UNDER_O], capture_output=True, text=True, timeout=300)
    assert done.stdout.split("\n")[0] == f"{[400] * 8} 401 403", done.stdout + done.stderr


UNDER_O = """
import sys
if sys.flags.optimize != 1: sys.exit(9)
from foretell.prompts import PromptPreparer
from foretell.server.config import ServerConfig
from foretell.server.text_engine import EngineAbout
from tests.server.client import request

class Engine:  # no tokenizer, no model: what is wrong is found before either is asked
    about = EngineAbout("none", 259, 512, "float32", 0)
    tokenizer = None
    preparer = PromptPreparer(None, 259, (), 0)
    def check(self, ids, params): self.preparer.params(params)

def post(path, config=None, **body): return request(Engine(), "POST", path, config, json=body).status_code
bad = ({"n": 999}, {"logprobs": 999}, {"stop": ["a"] * 99}, {"temperature": -1}, {"prompt": [10**6]}, {"foo": 1},
       {"max_tokens": 10, "min_tokens": 20}, {"logit_bias": {"99999": 1}})
print([post("/v1/completions", **{"prompt": [1], **fields}) for fields in bad],
      post("/v1/completions", ServerConfig(api_keys=("sk-0123456789",)), prompt=[1]),
      post("/admin/policy", policy="mixed"))
"""


def test_vllm_18826_the_queue_is_bounded() -> None:
    engine = start_tiny(max_num_seqs=1)
    engine.max_queue = 2

    async def go() -> list[httpx.Response]:
        async with client_for(engine) as client:
            body = {"prompt": "Hello", "max_tokens": 100, "ignore_eos": True}
            return list(await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(6))))

    try:
        answers = run(go())
    finally:
        engine.close()
    assert sorted(a.status_code for a in answers) == [200, 200, 429, 429, 429, 429]
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_llamacpp_24496_a_client_that_leaves_ends_its_request(tiny: LocalTextEngine, path: str, stream: bool) -> None:
    body = {"max_tokens": 440, "ignore_eos": True, "stream": stream}
    body |= {"prompt": "Hello"} if path == "/v1/completions" else {"messages": HELLO}
    before = tiny.stats()["generation_tokens"]

    async def go(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        text = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        writer.write(head.encode() + b"content-length: %d\r\n\r\n" % len(text) + text)
        while tiny.stats()["generation_tokens"] == before:  # until it is under way
            await asyncio.sleep(0.001)
        writer.close()
        await writer.wait_closed()
        del reader
        while tiny.unfinished:
            await asyncio.sleep(0.001)

    with serving(tiny) as url:
        run(asyncio.wait_for(go(int(url.rpartition(":")[2])), 60))
    assert tiny.stats()["generation_tokens"] - before < 440


def test_vllm_8058_health_is_not_green_when_the_engine_is_dead(tiny: LocalTextEngine) -> None:
    engine = start_tiny()
    engine.close()
    assert request(engine, "GET", "/health").status_code == 503
    answer = completion(engine)
    assert answer.status_code == 503
    assert "start the server again" in answer.json()["error"]["message"]
