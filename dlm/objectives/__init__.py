"""Noise, losses, bounds and likelihoods as pure functions; no files, no devices."""
