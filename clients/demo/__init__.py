"""``make demo``: two nodes hand over the KV cache of a real language model."""
