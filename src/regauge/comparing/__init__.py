"""Are two models the same function, derived from each other, or unrelated?"""

from regauge.comparing.compare import compare
from regauge.comparing.comparison import Comparison, Relation

__all__ = ["Comparison", "Relation", "compare"]
