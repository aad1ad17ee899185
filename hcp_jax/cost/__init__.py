"""Model the seconds, bytes and memory of a training step; NumPy only, nothing is compiled."""
