"""The verbs of `hcp`: each module parses its arguments, calls the library, and prints."""
