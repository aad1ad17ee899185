"""Rank splits of a cluster, explain the best one, audit one, and find the longest sequence."""
