"""How fast and how good over a grid of settings: sweeps, their journal, their pages."""
