"""Compute attention over a mesh: the public op, and each device's part inside shard_map."""
