"""The REST face: adapters over the Engine protocol, imported by the daemon only."""
