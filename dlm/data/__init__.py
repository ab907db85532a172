"""Sources of text -> packed batches of tokens."""
