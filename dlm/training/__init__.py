"""The one training loop, what it keeps on disk, and what surrounds it."""
