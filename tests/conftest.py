"""Settings for all tests: CI draws the same hypothesis examples every time, a developer new ones."""

from __future__ import annotations

import gc
import os

from hypothesis import settings

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_collection_finish() -> None:
    """Modules and tests stay: the collector need not look at their objects again, a quarter of a second each time.
    Nothing else is there yet."""
    gc.collect()
    gc.freeze()
