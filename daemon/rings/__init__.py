"""Rings in shared memory: the hot path of prepared transfers, beside gRPC."""
