"""Provide the parts of a decoder: rotary positions, MLP, embedding, loss."""
