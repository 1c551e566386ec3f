"""Effects of a feature: on the logits and on the loss, by path."""
