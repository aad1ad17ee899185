"""Meshes and what their axes do: contexts, sharding, roll, and one way into `shard_map`."""
