"""What a feature does: to the logits and to the loss, by path."""
