"""A canvas with masks -> the canvas filled: which slots to compute, which tokens to propose, which to commit."""
