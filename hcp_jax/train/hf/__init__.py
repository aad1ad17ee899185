"""Hugging Face folders: a run that begins from one, and a run that is written as one."""
