"""Node to node over TCP: framed protocol, authenticated handshake, lanes."""
