"""Measurements: step time against AdamW and read bandwidth, memory, kernels (README.md)."""
