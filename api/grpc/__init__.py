"""The gRPC face: adapters over the Engine protocol, imported by the daemon only."""
