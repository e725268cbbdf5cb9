"""The devices to plan for: how many, how much memory, and what it costs them to talk."""

from __future__ import annotations

import re
from dataclasses import dataclass

from foretell.cost.devices import DEVICES
from foretell.cost.links import CPU_LINK, Link, gpu_link
from foretell.errors import ConfigError
from foretell.memory import available_memory_bytes

_DEVICES = re.compile(r"(?:(\d{1,3})\s*[x×]\s*)?([A-Za-z0-9]+)")
CPU_KEYS = ("cpu", "laptop")


@dataclass(frozen=True, slots=True)
class Machine:
    """``count`` equal devices of one host. A CPU is one device, which ranks and replicas share."""

    key: str
    count: int
    memory_bytes: int  # of one device
    link: Link
    layer_seconds: float = 0.0  # what a layer takes beyond its bytes and operations, whatever a rank holds of it

    @property
    def is_cpu(self) -> bool:
        return self.key in CPU_KEYS

    def __str__(self) -> str:
        return self.key if self.is_cpu else f"{self.count}×{self.key.upper()}"


def parse_devices(text: str) -> Machine:
    """ "cpu" (this machine), "2xH200", "h100" …; ConfigError names those that are known."""
    match = _DEVICES.fullmatch(text.strip())
    key = match[2].lower() if match else ""
    count = int(match[1] or 1) if match else 0
    if key == "cpu" and count == 1:
        return Machine("cpu", 1, available_memory_bytes(), CPU_LINK)
    if key not in DEVICES or count < 1 or (key in CPU_KEYS and count > 1):
        raise ConfigError(f"{text!r} is no device to plan for: write cpu, 2xH200, or one of {', '.join(DEVICES)}")
    device = DEVICES[key]
    memory = int(device.memory_bytes)
    if key in CPU_KEYS:
        return Machine(key, 1, memory, CPU_LINK, device.layer_seconds)
    return Machine(key, count, memory, gpu_link(device.name, device.link_bytes_per_second), device.layer_seconds)
