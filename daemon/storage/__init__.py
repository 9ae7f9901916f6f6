"""Storage pools: memory on disks that the daemon owns, which survives it, and whose bytes are proven."""
