"""What is done between the steps of a training."""
