"""The parts of a decoder layer: rotary positions, MLP, embedding, loss."""
