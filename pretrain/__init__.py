"""What a run does: the training loop, evaluation, saving and monitoring."""
