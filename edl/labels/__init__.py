"""What the tokens of a batch count for."""
