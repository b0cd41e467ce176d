"""What is trained: mixers, blocks, the stack and the language model."""
