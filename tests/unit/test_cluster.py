"""What goes where, how many there should be, and who is let in: the parts of a cluster that need no Ray."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from concurrent.futures import TimeoutError as Late

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretell.cluster.door import Door, LinkError, dial
from foretell.cluster.place import Host, Span, most_cpus_per_rank, place, place_all, rooms
from foretell.cluster.scaling import Scaler, ScalingPolicy
from foretell.cluster.slot import interface_of
from foretell.errors import ConfigError

hosts_of = st.lists(st.integers(0, 9), max_size=5).map(
    lambda cpus: [Host(f"10.0.0.{number}", count) for number, count in enumerate(cpus)]
)


@given(hosts_of, st.integers(1, 6), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
def test_what_is_placed_has_room_and_keeps_stages_whole(
    hosts: list[Host], instances: int, tp: int, pp: int, cpus: int
) -> None:
    used: Counter[str] = Counter()
    for spans in place_all(hosts, instances, tp, pp, cpus):
        assert [rank for span in spans for rank in span.ranks] == list(range(tp * pp))  # each once, in order
        assert all(len(span.ranks) % tp == 0 for span in spans)
        used.update({span.address: len(span.ranks) for span in spans})
    whole = rooms(hosts, cpus)
    assert all(count <= whole[address] for address, count in used.items())


@given(hosts_of, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_nothing_is_placed_only_where_nothing_fits(hosts: list[Host], tp: int, pp: int, cpus: int) -> None:
    fits = sum(count // tp for count in rooms(hosts, cpus).values()) >= pp
    assert bool(place(rooms(hosts, cpus), {}, tp, pp)) == fits


def test_one_host_if_it_can_be_and_the_one_that_holds_the_fewest() -> None:
    assert place({"a": 2, "b": 4}, {"b": 1}, 1, 2) == [Span("a", (0, 1))]
    assert place({"a": 1, "b": 4}, {"b": 1}, 1, 2) == [Span("b", (0, 1))]
    assert place({"a": 1, "b": 1}, {}, 1, 2) == [Span("a", (0,)), Span("b", (1,))]
    assert place({"a": 3, "b": 3}, {}, 2, 2) == [Span("a", (0, 1)), Span("b", (2, 3))]


def test_a_host_that_was_just_lost_comes_last() -> None:
    assert place({"a": 2, "b": 2}, {}, 1, 1, avoid={"a"}) == [Span("b", (0,))]
    assert place({"a": 2, "b": 0}, {}, 1, 1, avoid={"a"}) == [Span("a", (0,))]


def test_ranks_get_as_many_cpus_as_fit_and_too_many_are_refused() -> None:
    hosts = [Host("a", 8), Host("b", 4)]
    assert most_cpus_per_rank(hosts, 1, 1, 1) == 8
    assert most_cpus_per_rank(hosts, 2, 1, 1) == 4
    assert most_cpus_per_rank(hosts, 1, 1, 3) == 4
    with pytest.raises(ConfigError, match="12 would"):
        most_cpus_per_rank(hosts, 13, 1, 1)


POLICY = ScalingPolicy(1, 3, running_per_replica=4, up_seconds=10, down_seconds=60)


def test_a_queue_that_lasts_brings_replicas_one_by_one() -> None:
    scaler = Scaler(POLICY)
    found = [scaler.wanted(float(now), 1, 50) for now in range(12)]
    assert found == [1] * 10 + [2, 1]  # the caller has not followed: it is asked again after the same time
    assert [scaler.wanted(t, 2, 50) for t in (12.0, 21.0, 22.0)] == [2, 3, 2]
    assert {scaler.wanted(float(t), 3, 50) for t in range(30, 60)} == {3}


def test_a_queue_that_comes_and_goes_brings_nothing() -> None:
    scaler = Scaler(POLICY)
    assert {scaler.wanted(float(t), 1, 50 if t % 9 else 0) for t in range(200)} == {1}


def test_a_load_that_fits_on_fewer_takes_one_away_but_never_the_last() -> None:
    scaler = Scaler(POLICY)
    assert [scaler.wanted(t, 2, 2) for t in (0.0, 59.0, 60.0)] == [2, 2, 1]
    assert {scaler.wanted(float(t), 1, 0) for t in range(100, 400)} == {1}


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(0, 100)), max_size=60))
def test_the_number_stays_within_its_bounds(looks: list[tuple[float, int]]) -> None:
    scaler, now, replicas = Scaler(POLICY), 0.0, 1
    for pause, unfinished in looks:
        now += pause
        wanted = scaler.wanted(now, replicas, unfinished)
        assert abs(wanted - replicas) <= 1
        assert POLICY.least <= wanted <= POLICY.most
        replicas = wanted


def test_who_knows_the_secret_is_let_in_once() -> None:
    door = Door("127.0.0.1")
    coming = door.expect("rank 0", b"secret")
    sock = dial("127.0.0.1", door.port, "rank 0", b"secret")
    with sock, coming.result(10) as other:
        sock.sendall(b"hello")
        assert other.recv(5) == b"hello"
    with pytest.raises(LinkError):  # no longer expected
        dial("127.0.0.1", door.port, "rank 0", b"secret")
    door.close()


@pytest.mark.parametrize(("name", "secret"), [("rank 0", b"another"), ("rank 1", b"secret")])
def test_who_does_not_is_not_and_learns_that_the_door_is_another(name: str, secret: bytes) -> None:
    door = Door("127.0.0.1")
    coming = door.expect("rank 0", b"secret")
    with pytest.raises(LinkError, match="does not know the secret"):
        dial("127.0.0.1", door.port, name, secret)
    with socket.create_connection(("127.0.0.1", door.port)) as stranger:
        stranger.sendall(b"GET / HTTP/")  # as long as what it waits for
        assert stranger.recv(1) == b""
    with pytest.raises(Late):
        coming.result(0)
    door.close()


def test_an_answer_that_is_only_repeated_opens_nothing() -> None:
    """Somebody who has recorded a greeting, word for word, is not let in with it."""
    door = Door("127.0.0.1")
    recorded: list[bytes] = []
    front = socket.create_server(("127.0.0.1", 0))

    def relay() -> None:
        ours, _ = front.accept()
        theirs = socket.create_connection(("127.0.0.1", door.port))
        with ours, theirs:
            recorded.append(ours.recv(4096))
            ours.sendall(theirs.recv(4096) if theirs.sendall(recorded[0]) is None else b"")
            recorded.append(ours.recv(4096))
            theirs.sendall(recorded[1])
            ours.sendall(theirs.recv(1))

    thread = threading.Thread(target=relay)
    thread.start()
    first = door.expect("rank 0", b"secret")
    dial("127.0.0.1", front.getsockname()[1], "rank 0", b"secret").close()
    first.result(10).close()
    thread.join(10)
    again = door.expect("rank 0", b"secret")
    with socket.create_connection(("127.0.0.1", door.port)) as thief:
        thief.sendall(recorded[0])
        thief.recv(4096)
        thief.sendall(recorded[1])
        assert thief.recv(1) == b""
    with pytest.raises(Late):
        again.result(0)
    front.close()
    door.close()


def test_the_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None
