"""Configuration and weights -> logits: the transformer, its attention, its cache of keys and values, its cost."""
