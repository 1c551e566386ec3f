"""The commands, grouped by topic: one frozen dataclass each, whose fields are its options, over `jobs`."""
