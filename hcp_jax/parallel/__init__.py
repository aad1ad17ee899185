"""Describe meshes and the roles of their axes; shard arrays, roll them, and enter `shard_map`."""
