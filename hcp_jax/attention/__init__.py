"""Attention over a mesh: the public op, and what each device does inside shard_map."""
