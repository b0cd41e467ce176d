"""Matrix products of 8-bit floating-point operands: recipes for their scales, and the backends that multiply them."""
