"""From a corpus to a folder of prepared data: chunks, restart, splits."""
