"""Training: the step, its shardings, the data, the loop around them."""
