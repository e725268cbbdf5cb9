"""Tensor and pipeline parallelism: a layout, shards of the weights, and wrappers around the model's parts."""
