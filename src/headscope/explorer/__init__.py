"""The feature explorer: a local server, and the same page as one file."""
