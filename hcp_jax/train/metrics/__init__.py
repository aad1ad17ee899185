"""Show and record a run while it trains: log lines, rates, traces and pictures."""
