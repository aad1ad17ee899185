"""What every room may use: checked values, safe reading and printing, config fields; no jax."""
