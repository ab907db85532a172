"""Texts -> numbers: reward functions with TRL's signature, `(prompts, completions, **columns) -> list of float`."""
