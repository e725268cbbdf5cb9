"""OpenTelemetry spans, by the extra ``foretell[otel]``. Nothing is made or sent unless an endpoint is given."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import foretell
from foretell.errors import ConfigError

if TYPE_CHECKING:
    from foretell.output import RequestMetrics
    from foretell.server.story import Story

ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}


def tracer_for(endpoint: str | None) -> Tracer | None:
    """A tracer that sends to ``endpoint``, or to the one in the environment; None if there is neither.

    ConfigError if an endpoint is given and the packages are missing.
    """
    endpoint = endpoint or os.environ.get(ENDPOINT_VARIABLE)
    if not endpoint:
        return None
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigError(f"the traces endpoint {endpoint!r} is no address: write http://127.0.0.1:4318/v1/traces")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ConfigError("spans need OpenTelemetry: pip install 'foretell[otel]'") from None
    resource = Resource.create({"service.name": "foretell", "service.version": foretell.__version__})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return Tracer(provider)


class Tracer:
    """An observer: a span for each request that reached an interface of models, with its phases as children.

    A ``traceparent`` header (W3C Trace Context) makes it part of its caller's trace, and is obeyed when it says
    that the trace is not sampled. Attributes: OpenTelemetry's for HTTP and generative AI, and vLLM's
    ``gen_ai.latency.*`` (seconds), so that what was made to read those reads these.
    """

    def __init__(self, provider: Any) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.provider = provider
        self.tracer = provider.get_tracer("foretell.server", foretell.__version__)
        self.propagator = TraceContextTextMapPropagator()

    def ended(self, story: Story) -> None:
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.status import Status, StatusCode

        if story.path not in _OPERATIONS:
            return
        carrier = {name: story.headers[name] for name in ("traceparent", "tracestate") if name in story.headers}
        span = self.tracer.start_span(
            f"{story.method} {story.path}",
            context=self.propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes=attributes(story),
            start_time=_nanoseconds(story, story.started),
        )
        if story.status >= 500 or story.status == 0 or not story.whole:
            span.set_status(Status(StatusCode.ERROR))
        within = set_span_in_context(span)
        for output in story.outputs:
            for name, start, end in phases(output.metrics):
                child = self.tracer.start_span(name, context=within, start_time=_nanoseconds(story, start))
                child.end(_nanoseconds(story, end))
        span.end(_nanoseconds(story, story.ended))

    def close(self) -> None:
        """Send what is left."""
        self.provider.shutdown()


def _nanoseconds(story: Story, seconds: float) -> int:
    """Unix time of a moment on the monotonic clock."""
    return int((story.epoch_offset + seconds) * 1e9)


def phases(metrics: RequestMetrics) -> list[tuple[str, float, float]]:
    """Name, start and end of what a generation went through, as far as it came."""
    moments = (metrics.arrival, metrics.first_scheduled, metrics.first_token, metrics.last_token)
    found = []
    for name, start, end in zip(("queue", "prefill", "decode"), moments, moments[1:], strict=False):
        if start is None or end is None:
            break
        found.append((name, start, end))
    return found


def attributes(story: Story) -> dict[str, Any]:
    made: dict[str, Any] = {
        "http.request.method": story.method,
        "url.path": story.path,
        "http.response.status_code": story.status,
        "gen_ai.operation.name": _OPERATIONS[story.path],
        "gen_ai.provider.name": "foretell",
        "gen_ai.request.model": story.model,
        "gen_ai.response.model": story.model,
        "gen_ai.request.id": story.request_id,
        "gen_ai.latency.e2e": story.seconds,
    }
    if story.generations:
        params = story.generations[0].params
        made |= {
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.choice.count": params.n,
            "gen_ai.request.n": params.n,
            "gen_ai.usage.input_tokens": story.prompt_tokens,
            "gen_ai.usage.output_tokens": story.output_tokens,
            "gen_ai.usage.prompt_tokens": story.prompt_tokens,
            "gen_ai.usage.completion_tokens": story.output_tokens,
            "gen_ai.usage.cache_read.input_tokens": story.cached_tokens,
            "gen_ai.response.finish_reasons": story.finish_reasons,
        }
    first = story.first
    if first is not None:
        made |= _latencies(story, first)
    return {name: value for name, value in made.items() if value is not None}


def _latencies(story: Story, metrics: RequestMetrics) -> dict[str, float]:
    spans = {name: end - start for name, start, end in phases(metrics)}
    made = {f"gen_ai.latency.time_in_model_{name}": spans[name] for name in ("prefill", "decode") if name in spans}
    if "queue" in spans:
        made["gen_ai.latency.time_in_queue"] = spans["queue"]
    if metrics.first_token is not None:
        made["gen_ai.latency.time_to_first_token"] = metrics.first_token - story.started
    if metrics.first_scheduled is not None and metrics.last_token is not None:
        made["gen_ai.latency.time_in_model_inference"] = metrics.last_token - metrics.first_scheduled
    return made
