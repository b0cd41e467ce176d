"""Prepared data on disk: the format, written, read, verified and counted."""
