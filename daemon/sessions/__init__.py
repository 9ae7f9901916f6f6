"""Attached clients: the table of sessions and the session socket."""
