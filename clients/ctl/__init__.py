"""``xferctl``, the command line for operators."""
