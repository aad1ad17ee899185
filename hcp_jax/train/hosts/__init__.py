"""Start the processes of a run, connect them, and stop and end them together."""
