"""Checkpoints on disk: written whole or not at all, and trusted only after their checksums agree."""
