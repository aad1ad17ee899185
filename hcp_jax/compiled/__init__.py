"""Compile for clusters that are not here, and read what the compiler made."""
