"""Prometheus metrics, one registry per application: vLLM's names under our prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from foretell.output import RequestOutput
    from foretell.server.text_engine import TextEngine

PREFIX: Final = "foretell:"
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_SHORT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0)
_TTFT_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)
_LONG_SECONDS = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKENS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))
_OUTPUTS = (1, 2, 5, 10, 20)
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From the request's arrival to its first token", _TTFT_SECONDS),
    "inter_token_latency_seconds": ("Between two tokens of one output", _SHORT_SECONDS),
    "request_time_per_output_token_seconds": ("Mean time per output token after the first", _SHORT_SECONDS),
    "e2e_request_latency_seconds": ("From arrival to the last token", _LONG_SECONDS),
    "request_queue_time_seconds": ("From arrival to the first step that had room", _LONG_SECONDS),
    "request_prefill_time_seconds": ("From the first step to the first token", _LONG_SECONDS),
    "request_decode_time_seconds": ("From the first token to the last", _LONG_SECONDS),
    "request_inference_time_seconds": ("From the first step to the last token", _LONG_SECONDS),
    "request_prompt_tokens": ("Prompt tokens of a request", _TOKENS),
    "request_generation_tokens": ("Output tokens of a request", _TOKENS),
    "request_params_n": ("Outputs asked for", _OUTPUTS),
    "request_params_max_tokens": ("Tokens asked for at most", _TOKENS),
}
_GAUGES = {
    "num_requests_running": ("running", "Requests in the running batch"),
    "num_requests_waiting": ("waiting", "Requests that wait to be scheduled"),
    "kv_cache_usage_perc": ("kv_usage", "Share of the KV cache in use; 1 is all of it"),
}
_COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Prompt tokens processed"),
    "generation_tokens": ("generation_tokens", "Tokens generated"),
    "prefix_cache_queries": ("prefix_cache_queries", "Tokens looked up in the prefix cache"),
    "prefix_cache_hits": ("prefix_cache_hits", "Tokens found in the prefix cache"),
    "engine_steps": ("steps", "Steps of the engine"),
    "engine_restarts": ("restarts", "Times that the engine process was started again"),
}
_PREDICTION_GAUGES = {
    "step_prediction_error": ("median_error", "Median of |predicted / measured - 1| over the last steps"),
    "step_prediction_error_p90": ("p90_error", "90th percentile of the same"),
    "step_prediction_drift": ("drift", "How much longer steps take than the profile said, without its correction"),
    "step_prediction_inside_interval": ("inside_interval", "Share of all steps within the predicted interval"),
    "profile_wrong": ("wrong", "1 once steps have been far off the profile for a while"),
}
_PREDICTION_COUNTERS = {
    "predicted_steps": ("steps", "Steps whose time was predicted"),
    "steps_beyond_profile": ("beyond_profile", "Steps too far outside the profile to be predicted"),
    "predicted_step_seconds": ("predicted_seconds", "What these steps should have taken"),
    "measured_step_seconds": ("measured_seconds", "What they took"),
}


class Metrics:
    """What one application has counted. Observing is cheap; figures of the engine are read when scraped."""

    def __init__(self, engine: TextEngine, model_name: Callable[[], str]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineFigures(engine, model_name))
        ProcessCollector(registry=self.registry)
        self._histograms = {
            name: Histogram(PREFIX + name, text, ["model_name"], buckets=buckets, registry=self.registry)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self._model_name = model_name  # known once the engine has started
        self._observers: dict[str, Callable[[float], None]] = {}
        self._success = Counter(
            PREFIX + "request_success",
            "Outputs that ended",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._failure = Counter(
            PREFIX + "request_failure", "Requests that failed", ["model_name", "reason"], registry=self.registry
        )
        self._answers = Counter(PREFIX + "http_requests", "Answers by status", ["status"], registry=self.registry)

    @cached_property
    def _model(self) -> str:
        return self._model_name()

    def observe(self, name: str, value: float | None) -> None:
        """One value of the histogram ``name``; None is none."""
        if value is None:
            return
        observer = self._observers.get(name)
        if observer is None:
            observer = self._observers[name] = self._histograms[name].labels(self._model).observe
        observer(max(0.0, value))

    def answered(self, status: int) -> None:
        self._answers.labels(str(status)).inc()

    def ended(self, reason: str) -> None:
        """One output ended: stop, length, abort (also a client that left) or error."""
        self._success.labels(self._model, reason).inc()

    def failed(self, reason: str) -> None:
        """A request was refused or lost: overloaded, unavailable, deadline, invalid, internal."""
        self._failure.labels(self._model, reason).inc()

    def finished(self, output: RequestOutput, n: int, max_tokens: int | None) -> None:
        """A request of ``n`` outputs is done; times are the engine's own."""
        times = output.metrics
        self.observe("request_prompt_tokens", len(output.prompt_token_ids))
        self.observe("request_generation_tokens", sum(len(choice.token_ids) for choice in output.outputs))
        self.observe("request_params_n", n)
        self.observe("request_params_max_tokens", max_tokens)
        self.observe("request_time_per_output_token_seconds", times.tpot_seconds)
        self.observe("e2e_request_latency_seconds", times.e2e_seconds)
        if times.first_scheduled is None or times.first_token is None or times.last_token is None:
            return
        self.observe("request_queue_time_seconds", times.first_scheduled - times.arrival)
        self.observe("request_prefill_time_seconds", times.first_token - times.first_scheduled)
        self.observe("request_decode_time_seconds", times.last_token - times.first_token)
        self.observe("request_inference_time_seconds", times.last_token - times.first_scheduled)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineFigures(Collector):
    """The engine's own figures, as of its last word."""

    def __init__(self, engine: TextEngine, model_name: Callable[[], str]) -> None:
        self._engine = engine
        self._model_name = model_name

    def collect(self) -> Iterable[Metric]:
        figures, model = self._engine.stats(), self._model_name()
        for name, (key, text) in _GAUGES.items():
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=["model_name"])
            gauge.add_metric([model], _number(figures.get(key)))
            yield gauge
        for name, (key, text) in _COUNTERS.items():
            counter = CounterMetricFamily(PREFIX + name, text, labels=["model_name"])
            counter.add_metric([model], _number(figures.get(key)))
            yield counter
        reasons = CounterMetricFamily(
            PREFIX + "num_preemptions", "Preemptions by reason", labels=["model_name", "reason"]
        )
        for reason, count in (figures.get("preemptions") or {}).items():
            reasons.add_metric([model, reason], count)
        yield reasons
        yield from _replicas(figures.get("replicas") or (), model)
        if prediction := figures.get("prediction"):
            yield from _prediction(prediction, model)


def _replicas(each: Sequence[Mapping[str, Any]], model: str) -> Iterable[Metric]:
    """Where there are several engines: which of them run, and how busy they are."""
    labels = ["model_name", "replica", "host"]
    for name, key, text in (
        ("replica_up", "state", "1 while the replica's engine runs"),
        ("replica_requests_running", "running", "Requests in the replica's running batch"),
        ("replica_requests_waiting", "waiting", "Requests that wait in the replica"),
    ):
        gauge = GaugeMetricFamily(PREFIX + name, text, labels=labels)
        for number, figures in enumerate(each):
            value = figures.get(key)
            at = [model, str(number), str(figures.get("host") or "")]
            gauge.add_metric(at, float(value == "running") if key == "state" else _number(value))
        if each:
            yield gauge


def _prediction(figures: Mapping[str, Any], model: str) -> Iterable[Metric]:
    """The live check of the cost model, where this machine was calibrated for the model."""
    for name, (key, text) in _PREDICTION_GAUGES.items():
        gauge = GaugeMetricFamily(PREFIX + name, text, labels=["model_name"])
        gauge.add_metric([model], _number(figures.get(key)))
        yield gauge
    for name, (key, text) in _PREDICTION_COUNTERS.items():
        counter = CounterMetricFamily(PREFIX + name, text, labels=["model_name"])
        counter.add_metric([model], _number(figures.get(key)))
        yield counter
    text = "What the profile is multiplied with to fit this machine"
    scales = GaugeMetricFamily(PREFIX + "profile_scale", text, labels=["model_name", "component"])
    for component, scale in (figures.get("scales") or {}).items():
        scales.add_metric([model, component], scale)
    yield scales


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0
