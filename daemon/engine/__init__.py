"""Transfers: states, scheduling, planning, and the runner that performs them."""
