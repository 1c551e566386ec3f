"""When a feature fires: comparison with a proxy, its false negatives, and the model's predictions there."""
