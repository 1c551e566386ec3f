"""One question a file; each returns frozen records."""
