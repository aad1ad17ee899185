"""Cut a model's layers over the stages of a pp axis, and run microbatches through them in ticks."""
