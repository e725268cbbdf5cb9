"""What a calibration says of the machine it was made on, and how much of its memory it takes."""

from __future__ import annotations

import platform

from foretell.cost.devices import DEVICES

CPU_KV_BYTES = 3 << 30


def kv_bytes_to_measure(device: str) -> int | None:
    """A cache no larger than the grid needs: it is filled with numbers. None leaves a GPU's as it is."""
    import torch

    from foretell.memory import default_kv_bytes

    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return None
    return min(CPU_KV_BYTES, default_kv_bytes())


def machine_name(device: str = "cpu", num_threads: int = 0) -> str:
    """The processor or device, as its maker calls it, and how many of its threads compute."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    count = num_threads or len(names) or 1
    return f"{name}, {count} thread{'' if count == 1 else 's'}"


def device_key(device: str) -> str:
    """Which of ``DEVICES`` this is; "" for none of them."""
    if device != "cuda":
        return ""
    name = machine_name(device).lower()
    return next((key for key in sorted(DEVICES, key=len, reverse=True) if key in name.replace(" ", "")), "")
