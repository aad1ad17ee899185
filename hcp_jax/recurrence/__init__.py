"""Recurrences over a stream that is cut over devices: what crosses a border is an affine map."""
