"""Compute the geometry of sequences without devices: layouts, groupings, masks, packed buffers."""
