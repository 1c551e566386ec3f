"""Studies of heads: their functions, and the features each of them makes."""
