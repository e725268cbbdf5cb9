"""Outputs to text: what a caller sees of its requests, wherever the engine runs."""

from __future__ import annotations

from collections.abc import Sequence

from foretell.core.counters import Progress
from foretell.core.messages import Output
from foretell.core.params import SamplingParams
from foretell.errors import InvalidRequestError, UnavailableError
from foretell.tracking import Tracker, Tracking, Update


class Port:
    """Writes down what an engine would have been told."""

    def __init__(self, refuse: bool = False) -> None:
        self.refuse = refuse
        self.added: list[tuple[int, int]] = []
        self.finished: list[tuple[list[int], str]] = []

    def add(self, first_id: int, ids: list[int], params: SamplingParams, *, priority: int, arrival: float) -> None:
        if self.refuse:
            raise InvalidRequestError("no")
        self.added.append((first_id, params.n))

    def finish(self, request_ids: Sequence[int], reason: str) -> None:
        self.finished.append((list(request_ids), reason))


class Letters:
    """A tokenizer of sorts: token 97 is "a"."""

    special_ids = frozenset((0,))

    class decoding:  # noqa: N801
        kind, strip = "metaspace", 0

    @staticmethod
    def token(number: int) -> str:
        return chr(number)


def started(port: Port, **options: object) -> tuple[Tracking, Tracker, list[Update]]:
    tracking, updates = Tracking(port, Letters()), []  # type: ignore[arg-type, var-annotated]
    tracker = Tracker(7, None, [1, 2], SamplingParams(**options), updates.append, 0.5)  # type: ignore[arg-type]
    tracking.start(tracker)
    return tracking, tracker, updates


def tokens(text: str, request_id: int = 0) -> list[Output]:
    return [Output(request_id, ord(letter)) for letter in text]


def test_tokens_past_a_stop_string_are_dropped_and_the_engine_is_told_once() -> None:
    port = Port()
    tracking, tracker, updates = started(port, stop=["cd"])
    tracking.take(tokens("abcdefg"), 1.0)  # as an engine that runs ahead would
    completion = tracker.output.outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("ab", "stop", "cd")
    assert completion.token_ids == [ord(c) for c in "abcd"]
    assert port.finished == [([0], "stop")]
    assert "".join(u.delta_text for u in updates) == "ab"
    assert [u.finish_reason for u in updates][-2:] == [None, "stop"]


def test_each_of_n_outputs_gets_its_own_tokens() -> None:
    tracking, tracker, updates = started(Port(), n=3)
    tracking.take([*tokens("x", 2), *tokens("y", 0), *tokens("z", 1), Output(2, finish_reason="length")], 1.0)
    assert [o.text for o in tracker.output.outputs] == ["y", "z", "x"]
    assert [(u.index, u.finish_reason) for u in updates] == [(2, None), (0, None), (1, None), (2, "length")]
    assert not tracker.output.finished


def test_leaving_ends_what_is_still_open_and_only_that() -> None:
    port = Port()
    tracking, tracker, _ = started(port, n=2)
    tracking.take([Output(0, 97, finish_reason="stop", stop_token=97)], 1.0)
    tracking.abort(tracker)
    tracking.abort(tracker)
    assert port.finished == [([1], "abort")]
    assert [o.finish_reason for o in tracker.output.outputs] == ["stop", "abort"]
    tracking.take(tokens("late", 1), 2.0)
    assert tracker.output.outputs[1].token_ids == []


def test_everybody_hears_once_that_the_engine_is_gone() -> None:
    tracking, _, first = started(Port(), n=2)
    second: list[Update] = []
    tracking.start(Tracker(8, None, [1], SamplingParams(), second.append, 0.0))
    tracking.fail_all(lambda: UnavailableError("gone"))
    tracking.fail_all(lambda: UnavailableError("gone"))
    assert [str(u.error) for u in (*first, *second)] == ["gone", "gone"]
    assert first[0].error is not second[0].error, "each raises its own: tracebacks are not shared"


def test_a_refusal_is_told_to_its_caller_alone() -> None:
    _, tracker, updates = started(Port(refuse=True))
    assert isinstance(updates[0].error, InvalidRequestError)
    assert tracker.open == 0


def test_times_and_figures_come_from_the_engine() -> None:
    tracking, tracker, _ = started(Port())
    tracking.take([Output(0, 97, progress=Progress(0.75, 16, 0))], 1.0)
    tracking.take(tokens("b"), 2.0)
    tracking.take([Output(0, 99, finish_reason="length", progress=Progress(0.75, 32, 1))], 3.0)
    metrics = tracker.output.metrics
    assert (metrics.arrival, metrics.first_scheduled, metrics.first_token, metrics.last_token) == (
        0.5,
        0.75,
        1.0,
        3.0,
    )
    assert (metrics.cached_tokens, metrics.preemptions, metrics.num_output_tokens) == (16, 1, 3)
