"""Data sets by name, their shards and their batches."""
