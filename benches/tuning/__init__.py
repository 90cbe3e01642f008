"""The tuners of the tables under kernels/tuned; `benches/tune.py` is their command."""
