"""What a run reads: tokenizers, corpus preparation, token shards, and the batches cut from them."""
