"""What the log and the traces tell of requests, and what they must not."""

from __future__ import annotations

import io
import json
import logging
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from foretell.errors import ConfigError
from foretell.server.app import create_app
from foretell.server.config import ServerConfig
from foretell.server.logs import AccessLog, configure
from foretell.server.tracing import ENDPOINT_VARIABLE, tracer_for
from tests.server.client import URL, run

KEY = "sk-0123456789"
SECRET = "a prompt that is nobody's business"


def ask(engine: Any, observers: Any, requests: Any, config: ServerConfig | None = None) -> list[httpx.Response]:
    async def go() -> list[httpx.Response]:
        app = create_app(engine, config, observers=observers)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=URL, timeout=60) as client:
            return [await client.request(*args, **options) for args, options in requests]

    return run(go())


def completion(prompt: str = SECRET, **options: Any) -> Any:
    headers = options.pop("headers", {})
    body = {"prompt": prompt, "max_tokens": 5, "ignore_eos": True, "temperature": 0, **options}
    return ("POST", "/v1/completions"), {"json": body, "headers": headers}


@contextmanager
def logging_to(format: Any, level: str = "info") -> Any:
    names = ("foretell", "uvicorn")
    before = {n: (logging.getLogger(n).handlers, logging.getLogger(n).level) for n in names}
    stream = io.StringIO()
    configure(format, level, stream)
    try:
        yield stream
    finally:
        for name, (handlers, old) in before.items():
            logger = logging.getLogger(name)
            logger.handlers, logger.propagate = handlers, True
            logger.setLevel(old)


# -- the log ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_json_line_tells_the_facts_and_no_text(tiny: Any, stream: bool) -> None:
    with logging_to("json") as log:
        answer = ask(tiny, [AccessLog()], [completion(stream=stream, n=2)])[0]
    (line,) = [json.loads(text) for text in log.getvalue().splitlines()]
    assert line["request_id"] == answer.headers["x-request-id"]
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)
    assert line["complete"] is True
    assert (line["prompt_tokens"], line["output_tokens"]) == (len(SECRET.encode()), 10)
    assert line["finish_reasons"] == ["length", "length"]
    assert 0 <= line["queue_seconds"] <= line["ttft_seconds"] <= line["seconds"]
    assert line["level"] == "info"
    assert SECRET not in log.getvalue()
    if not stream:
        assert answer.json()["choices"][0]["text"] not in log.getvalue()


def test_refusals_are_told_and_polls_are_not(tiny: Any) -> None:
    locked = ServerConfig(api_keys=(KEY,))
    right = {"authorization": f"Bearer {KEY}"}
    requests = [
        (("GET", "/health"), {}),
        (("GET", "/ready"), {"headers": right}),
        (("GET", "/v1/models?key=secret"), {}),
        (("GET", "/v1/models"), {"headers": right}),
        completion(headers=right, max_tokens=-1),
    ]
    with logging_to("json") as log:
        ask(tiny, [AccessLog()], requests, locked)
    lines = [json.loads(text) for text in log.getvalue().splitlines()]
    assert [(line["path"], line["status"]) for line in lines] == [
        ("/v1/models", 401),
        ("/v1/models", 200),
        ("/v1/completions", 400),
    ]
    assert KEY not in log.getvalue()
    assert "secret" not in log.getvalue()


def test_a_client_cannot_write_lines_of_its_own(tiny: Any) -> None:
    """A newline in a path, which arrives percent-encoded, must not begin a line in the log."""
    for kind in ("human", "json"):
        with logging_to(kind) as log:
            ask(tiny, [AccessLog()], [(("GET", "/x%0a12:00:00.000 info GET /admin 200%1b[2J"), {})])
        text = log.getvalue()
        assert text.count("\n") == 1, kind
        assert "\x1b" not in text


def test_lines_for_people(tiny: Any) -> None:
    with logging_to("human") as log:
        answer = ask(tiny, [AccessLog()], [completion()])[0]
    line = log.getvalue()
    assert "info    POST /v1/completions 200 in " in line
    assert f", {len(SECRET)} + 5 tokens, TTFT " in line
    assert line.strip().endswith(answer.headers["x-request-id"])


def test_an_observer_that_fails_harms_nobody(tiny: Any) -> None:
    class Broken:
        def ended(self, story: Any) -> None:
            raise RuntimeError("no")

    with logging_to("json") as log:
        answers = ask(tiny, [Broken(), AccessLog()], [completion()])
    assert answers[0].status_code == 200
    failure, line = (json.loads(text) for text in log.getvalue().splitlines())
    assert "an observer failed" in failure["message"]
    assert "RuntimeError: no" in failure["traceback"]
    assert line["status"] == 200


# -- spans ------------------------------------------------------------------------------------------------


@contextmanager
def collector() -> Any:
    """A real OTLP endpoint: what it was sent, decoded."""
    received: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            import gzip

            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            message = ExportTraceServiceRequest()
            message.ParseFromString(body)
            received.append(message)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", received
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def spans_of(received: list[Any]) -> list[Any]:
    return [span for m in received for r in m.resource_spans for scope in r.scope_spans for span in scope.spans]


def traced(engine: Any, *requests: Any) -> list[Any]:
    with collector() as (endpoint, received):
        tracer = tracer_for(endpoint)
        assert tracer is not None
        ask(engine, [tracer], requests)
        tracer.close()
        return spans_of(received)


def values(span: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


def test_a_span_has_tokens_times_and_phases(tiny: Any) -> None:
    spans = traced(tiny, completion(top_p=0.5, temperature=0.5), (("GET", "/health"), {}))
    root = next(span for span in spans if span.name == "POST /v1/completions")
    assert {span.name for span in spans} == {root.name, "queue", "prefill", "decode"}
    found = values(root)
    assert found["gen_ai.operation.name"] == "text_completion"
    assert found["gen_ai.usage.input_tokens"] == found["gen_ai.usage.prompt_tokens"] == len(SECRET)
    assert found["gen_ai.usage.output_tokens"] == found["gen_ai.usage.completion_tokens"] == 5
    assert (found["gen_ai.request.max_tokens"], found["gen_ai.request.top_p"]) == (5, 0.5)
    assert found["http.response.status_code"] == 200
    parts = [found[f"gen_ai.latency.{n}"] for n in ("time_in_queue", "time_in_model_prefill", "time_in_model_decode")]
    assert all(part >= 0 for part in parts)
    assert sum(parts) <= found["gen_ai.latency.e2e"]
    assert found["gen_ai.latency.time_to_first_token"] >= parts[0] + parts[1]
    children = sorted((s for s in spans if s is not root), key=lambda s: s.start_time_unix_nano)
    assert [child.name for child in children] == ["queue", "prefill", "decode"]
    for child in children:
        assert child.parent_span_id == root.span_id
        assert root.start_time_unix_nano <= child.start_time_unix_nano
        assert child.end_time_unix_nano <= root.end_time_unix_nano
    assert SECRET not in str(spans)


def test_a_callers_trace_goes_on_and_its_no_is_obeyed(tiny: Any) -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    sampled = {"traceparent": f"00-{trace}-{parent}-01"}
    unsampled = {"traceparent": f"00-{trace[::-1]}-{parent}-00"}
    nonsense = {"traceparent": "00-zz-zz-01"}
    spans = traced(tiny, *(completion(headers=headers) for headers in (sampled, unsampled, nonsense)))
    roots = [span for span in spans if span.name.startswith("POST")]
    assert len(roots) == 2
    own = next(span for span in roots if span.trace_id.hex() == trace)
    assert own.parent_span_id.hex() == parent
    other = next(span for span in roots if span is not own)
    assert other.parent_span_id == b""


def test_a_refusal_is_a_span_without_tokens(tiny: Any) -> None:
    (span,) = traced(tiny, completion(max_tokens=-1))
    assert values(span)["http.response.status_code"] == 400
    assert "gen_ai.usage.input_tokens" not in values(span)


def test_nothing_is_traced_unless_an_endpoint_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENDPOINT_VARIABLE, raising=False)
    assert tracer_for(None) is None
    with pytest.raises(ConfigError, match="no address"):
        tracer_for("127.0.0.1:4317")
