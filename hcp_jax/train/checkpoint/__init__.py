"""Checkpoints: saved, sealed, checked and restored, by one process or many."""
