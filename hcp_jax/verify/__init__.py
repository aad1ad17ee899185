"""Check, on the available devices, that context parallelism computes the same as one device."""
