"""Helpers for every room: argument checks, safe reading and printing, config fields; no jax."""
