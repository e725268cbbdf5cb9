"""The scaling bench: how layouts are written, and that its figures follow from the walls."""

from __future__ import annotations

import pytest

from foretell.benchmark.scaling import Row, ms_per_step, parse_layouts, report, theory_lines
from foretell.errors import ConfigError
from foretell.parallel.layout import make_layout
from foretell.trace.workloads import Lengths, Workload, random_workload
from tests.parallel.test_layout import spec_of


def test_layouts_are_tp_x_pp() -> None:
    assert parse_layouts("1x1, 2x1,1x3,4") == [(1, 1), (2, 1), (1, 3), (4, 1)]
    for bad in ("", "2y1", "0x1", "1x0", "x2", "-1x1"):
        with pytest.raises(ConfigError, match="TPxPP"):
            parse_layouts(bad)


def test_speed_up_and_efficiency_are_against_the_first_layout() -> None:
    spec = spec_of(8, 8)
    rows = [
        Row(make_layout(spec, 1, 1), [8.0, 12.0, 10.0], [1.0, 1.0, 1.0]),
        Row(make_layout(spec, 2, 1), [5.0, 4.0, 9.0], [1.0, 2.0, 1.0]),
    ]
    assert ms_per_step(rows[1], 5) == 1000.0
    one, two = report(rows, _workload(), 5).splitlines()[1:]
    assert one.split()[-2:] == ["100", "%"]
    assert two.split()[-3:] == ["2.00", "100", "%"]


def test_one_rank_sends_nothing() -> None:
    spec = spec_of(8, 8)
    lines = theory_lines(spec, [Row(make_layout(spec, 1, 1))], _workload())[1].splitlines()
    assert lines[1].split()[2:] == ["0", "0", "0", "0"]


def _workload() -> Workload:
    return random_workload(3, Lengths.parse("4"), Lengths.parse("5"), 0)
