"""When a feature fires: against a proxy, where it misses one, and what the model predicts there."""
