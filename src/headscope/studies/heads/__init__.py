"""What the heads of a model do, and which features each of them makes."""
