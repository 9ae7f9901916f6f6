"""Other nodes: who they are, and what they may do here."""
