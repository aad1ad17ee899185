"""Provide Flax models with context-parallel attention."""
