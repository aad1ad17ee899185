"""Flax models whose attention is context parallel."""
