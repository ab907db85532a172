"""A folder or a hub id <-> a model with its tokenizer and all that it says of itself."""
