"""What looks on while a run trains: whether its ranks still move, and whether its numbers are sound."""
