"""What several studies share: active text tokens, and what replaces the z of an ablated head."""
