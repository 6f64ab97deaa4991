"""Benchmarks of speed, memory and accuracy: `python -m benchmarks.NAME` in the repository root."""
