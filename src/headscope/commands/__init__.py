"""The commands, by what they are about: one frozen dataclass each, whose fields are its options, over `jobs`."""
