"""The processes of a run: how they start, know of each other, stop together and end together."""
