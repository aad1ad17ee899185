"""Compute attention on one device: the blockwise core, which knows no mesh and no axis names."""
