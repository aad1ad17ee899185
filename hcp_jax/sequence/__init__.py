"""Geometry of sequences: layouts, groupings, masks as intervals, packed buffers; no devices."""
