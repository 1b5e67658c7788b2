r"""What q looks like, given a context: one file per family, found by name in the registry.

A family knows nothing of data, plates or Pyro's handlers. Where its context comes from is the guide's business: free
parameters, an encoder, an encoder and some gradient steps.
"""

from .base import Family
from .normal import Normal

__all__ = ["Family", "Normal"]
