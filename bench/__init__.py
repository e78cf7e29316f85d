"""Measure step times against AdamW and the read bandwidth, memory and kernels (see README.md)."""
