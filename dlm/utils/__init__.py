"""Tools without knowledge of the domain: hardware, processes, files, progress, statistics, random streams, settings."""
