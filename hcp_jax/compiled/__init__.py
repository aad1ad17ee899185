"""Compile for clusters that are not available, and read the compiled programs."""
