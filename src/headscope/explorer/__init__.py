"""The page that shows features: a local server, and the same page as one file."""
