"""What a step must cost at least on given hardware, from the architecture alone."""

from foretell.cost.floor import ChunkShape, FloorCost, StepWork, WeightBytes
from foretell.cost.hardware import Hardware, measure_hardware

__all__ = ["ChunkShape", "FloorCost", "Hardware", "StepWork", "WeightBytes", "measure_hardware"]
