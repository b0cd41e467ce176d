"""Text, and the tokens it becomes: input formats and tokenizers."""
