"""What is seen of a run while it trains, and kept of it: lines, rates, traces, pictures."""
