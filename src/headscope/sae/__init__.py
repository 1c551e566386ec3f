"""Sparse autoencoders: the model, its training, its quality, its files."""
