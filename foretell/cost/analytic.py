"""The roofline as a profile: what data sheets and the architecture say of a device that nobody has measured.

Every part takes the longer of its reads and its operations (Williams et al. 2009), at the rates that engines reach,
and every layer a little more (``Device.layer_seconds``). The grid has a point where reading and computing change
places, so that nothing is lost between points; it says of itself that it is analytic, and its interval is wide.
"""

from __future__ import annotations

from dataclasses import replace

from foretell.config import ModelSpec
from foretell.cost import operations
from foretell.cost.devices import Device
from foretell.cost.floor import FloorCost, WeightBytes
from foretell.cost.grid import Curve, Surface
from foretell.cost.hardware import BYTES_PER_ELEMENT
from foretell.cost.profile import Profile

LOW, HIGH = 0.7, 2.0  # low: the data sheet's own rates; high: three models on an H200 took up to 1.6 times it
MOST_TOKENS, MOST_KEYS = float(1 << 20), float(1 << 22)
QUERIES = (2.0, 8.0, 32.0, 128.0, 512.0, 2048.0, 8192.0, MOST_TOKENS)


def analytic_profile(
    spec: ModelSpec,
    device: Device,
    dtype: str,
    *,
    key: str = "",
    model: str = "",
    weights: WeightBytes | None = None,
    weight_format: str | None = None,
) -> Profile:
    """``dtype``: of cache and products, and of the weights unless ``weights`` says how they are kept."""
    hardware = device.sustained()
    reads, flops = hardware.read_bytes_per_second, hardware.rate(dtype)
    kept = weights or WeightBytes.in_dtype(spec, dtype)
    floor = FloorCost(spec, hardware, dtype, kept)
    layers = _roof(kept.layers / reads, 2.0 * floor.matrix_parameters / flops)
    kv_bytes = spec.kv_bytes_per_token(BYTES_PER_ELEMENT[dtype])
    pair_flops = spec.num_layers * operations.score_flops(spec, 1)
    per_key, per_pair = kv_bytes / reads, pair_flops / flops
    launches = spec.num_layers * device.layer_seconds
    prefill = [(queries, MOST_KEYS, max(per_pair, per_key / queries)) for queries in QUERIES]
    return Profile(
        model=model or spec.family,
        spec=spec,
        dtype=dtype,
        weight_format=weight_format or dtype,
        kernels="any",
        hardware=f"{device.name}, by its data sheet",
        created="data sheet",
        versions={},
        block_size=16,
        linear=replace(layers, y=tuple(y + launches for y in layers.y)),
        head=_roof(kept.head / reads, 2.0 * floor.head_parameters / flops),
        host=Curve.of([(1.0, device.step_seconds)]),
        decode_rate=Surface.of([(MOST_TOKENS, MOST_KEYS, max(per_pair, per_key))]),
        prefill_rate=Surface.of(prefill),
        low=LOW,
        high=HIGH,
        median_error=0.0,
        held_out=[],
        source="analytic",
        device=key,
    )


def _roof(read_seconds: float, seconds_per_row: float) -> Curve:
    """max(read once, so much a row), with a point at the knee."""
    knee = max(1.0, read_seconds / seconds_per_row)
    rows = sorted({1.0, knee, 2 * knee, max(MOST_TOKENS, 4 * knee)})
    return Curve.of([(row, max(read_seconds, seconds_per_row * row)) for row in rows])
