"""The `hcp` command, one file per verb: parse, call the library, print."""
