"""`hcp verify`: proof, on the devices at hand, that context parallelism computes what one does."""
