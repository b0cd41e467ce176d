"""What Triton compiles. Parameters of a kernel are untyped, because Triton reads their annotations itself."""
