r"""Many starts, the best of which is kept: a fit climbs the hill that it starts on.

`Search` screens all starts by a few iterations and takes the best of them to the end. `Initial` says where they begin,
`Lockstep` runs exact iterations of all of them side by side.
"""

from .entry import find, first_batch, recent
from .initial import Initial, check
from .lockstep import Lockstep, Together
from .search import Search
from .starts import Start, table

__all__ = [
    "Initial",
    "Lockstep",
    "Search",
    "Start",
    "Together",
    "check",
    "find",
    "first_batch",
    "recent",
    "table",
]
