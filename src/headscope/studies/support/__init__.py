"""Shared by several studies: active text tokens, and replacements for the z of an ablated head."""
