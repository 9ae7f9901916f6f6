"""Proto files and the code generated from them (``generate.py``)."""
