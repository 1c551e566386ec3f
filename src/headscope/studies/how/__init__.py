"""How a feature is computed: by head, by source token, by patching, and as a tree of attributions."""
