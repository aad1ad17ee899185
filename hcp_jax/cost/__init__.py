"""Seconds, bytes and memory of a training step, by model; NumPy only, nothing is compiled."""
