"""One prompt: its active features, their DFA, and ablations."""
