"""Induction features, with and without choosing a head."""
