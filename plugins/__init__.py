"""How bytes move: the Backend interface, the registry, one module or folder a backend."""
