"""Speed of the package against Pyro's own, as ratios from one process: ``python -m benchmarks [name ...]``."""
