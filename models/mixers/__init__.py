"""Token mixers, one class in one file each."""
