"""Carriers: what is taken is what the files hold, in any order and from any thread; nothing hangs, nothing stays."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from foretell.errors import ModelFormatError
from foretell.model import carriers, lanes
from foretell.model.carriers import Carriers
from foretell.model.lanes import Piece
from foretell.model.weights import stack
from foretell.store.safetensors_file import SafetensorsSource

CPU = torch.device("cpu")
SIZES = (1, 3, 249, 250, 251, 700, 2000)  # numbers of four bytes, a piece being 1000 bytes
WINDOW = 20_000


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "PIECE_BYTES", 1000)
    monkeypatch.setattr(carriers, "WINDOW_BYTES", WINDOW)


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, Tensor]:
    """Of two files, forty."""
    rng, found = random.Random(3), {}
    for file in "ab":
        made = {f"{file}{number}": torch.randn(rng.choice(SIZES)) for number in range(20)}
        save_file(made, tmp_path / f"{file}.safetensors")
        found.update(made)
    return found


def carrying() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "foretell-carry"]


@contextmanager
def carriers_of(folder: Path) -> Iterator[Carriers]:
    own = Carriers(CPU, SafetensorsSource(folder).place)
    try:
        yield own
    finally:
        own.close()
        assert not carrying()


def in_threads(jobs: list[Callable[[], Any]]) -> list[Any]:
    """What each returned or raised; one that hangs fails the test."""
    found: list[Any] = [None] * len(jobs)

    def run(number: int) -> None:
        try:
            found[number] = jobs[number]()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "hangs"
    return found


def same(raw: Tensor, tensor: Tensor) -> bool:
    return torch.equal(raw.view(torch.float32), tensor)


@pytest.mark.parametrize("announced", [40, 17, 0])
@pytest.mark.parametrize("window", [1, WINDOW, 1 << 30])
def test_any_order_from_several_threads(
    tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, announced: int, window: int
) -> None:
    monkeypatch.setattr(carriers, "WINDOW_BYTES", window)
    names, rng = list(tensors), random.Random(window + announced)
    order = rng.sample(names, len(names))
    with carriers_of(tmp_path) as own:
        if announced:
            crates = [names[at : at + 3] for at in range(0, announced, 3)]
            own.expect(crates)

        def take(mine: list[str]) -> dict[str, Tensor]:
            return {name: own.take(name) for name in mine}

        found = in_threads([partial(take, order[number::4]) for number in range(4)])
    taken = {name: raw for part in found for name, raw in part.items()}
    assert taken.keys() == tensors.keys()
    assert all(same(raw, tensors[name]) for name, raw in taken.items())


def test_who_takes_a_tensor_again_or_with_another_gets_it(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    with carriers_of(tmp_path) as own:
        own.expect([["a1"], ["a2"]])
        first = own.take("a1")
        again = own.take("a1")
        together = in_threads([partial(own.take, "a2") for _ in range(8)])
    assert all(same(raw, tensors["a1"]) for raw in (first, again))
    assert all(same(raw, tensors["a2"]) for raw in together)


def test_tensors_of_a_crate_are_stacked_without_a_copy(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    names = ["a4", "b7", "a0"]
    with carriers_of(tmp_path) as own:
        own.expect([["b1"], names])
        parts = [own.take(name).view(torch.float32).view(-1, 1) for name in names]
        alone = own.take("b1").view(torch.float32).view(-1, 1)
    whole = stack(parts)
    assert whole.data_ptr() == parts[0].data_ptr()
    assert torch.equal(whole[:, 0], torch.cat([tensors[name] for name in names]))
    for others in (parts[::-1], [parts[0], parts[2]], [alone, *parts]):
        copied = stack(others)
        assert copied.data_ptr() != others[0].data_ptr()
        assert torch.equal(copied, torch.cat(others))
    assert stack([alone]) is alone


def test_no_more_is_made_than_the_window_allows(
    tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, seen = lanes.read, []

    def counted(piece: Piece, view: memoryview) -> None:
        seen.append(len(view))
        read(piece, view)

    monkeypatch.setattr(lanes, "read", counted)
    fitting = 0
    for tensor in tensors.values():
        if fitting + tensor.nbytes > WINDOW:
            break
        fitting += tensor.nbytes
    with carriers_of(tmp_path) as own:
        own.expect([[name] for name in tensors])
        until = time.monotonic() + 30
        while sum(seen) < fitting and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(0.05)  # more would come now
        assert sum(seen) == fitting
        taken = 0
        for name, tensor in tensors.items():
            assert same(own.take(name), tensor)
            taken += tensor.nbytes
            assert sum(seen) - taken <= WINDOW
        assert sum(seen) == taken


def test_what_nobody_announced_or_takes_is_not_carried(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    with carriers_of(tmp_path) as own:
        assert not carrying()  # nor does anybody wait for work
        os.unlink(tmp_path / "b.safetensors")
        own.expect([[name] for name in tensors if name.startswith("a")])
        assert all(same(own.take(name), tensor) for name, tensor in tensors.items() if name.startswith("a"))


def last_of(folder: Path, tensors: dict[str, Tensor], file: str) -> str:
    place = SafetensorsSource(folder).place
    return max((name for name in tensors if name.startswith(file)), key=lambda name: place(name)[1])


@pytest.mark.parametrize("announced", [True, False])
def test_a_short_file_is_said_to_all_who_wait(tmp_path: Path, tensors: dict[str, Tensor], announced: bool) -> None:
    path, last = tmp_path / "b.safetensors", last_of(tmp_path, tensors, "b")
    with carriers_of(tmp_path) as own:
        os.truncate(path, path.stat().st_size - 3)
        if announced:
            own.expect([[name] for name in tensors])
        for error in in_threads([partial(own.take, last) for _ in range(3)]):
            assert isinstance(error, ModelFormatError)
            assert str(error) == "b.safetensors ends in the middle of a tensor; fetch it again"
        with pytest.raises(ModelFormatError, match="ends in the middle"):
            own.take("a0")


def test_a_file_that_has_gone_is_said(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    with carriers_of(tmp_path) as own:
        (tmp_path / "b.safetensors").unlink()
        assert same(own.take("a0"), tensors["a0"])
        with pytest.raises(ModelFormatError, match=r"^b\.safetensors cannot be read: No such file"):
            own.take("b0")


def test_what_is_left_over_when_it_is_closed(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with carriers_of(tmp_path) as own:
            own.expect([[name] for name in tensors])
            own.take("b3")
            own.close()
    assert len(os.listdir("/proc/self/fd")) == files
