"""The ``cuda`` backend: GPU memory, moved by worker processes so that the daemon itself has no CUDA context.

Imports nothing: a worker is a module of this package, and needs none of the daemon's side (``backend.py``).
"""
