"""The replication report: every study of the post on SAEs of one model, side by side, as claims with their numbers."""
