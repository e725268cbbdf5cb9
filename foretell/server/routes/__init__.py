"""One module per endpoint; each has a ``router``."""
