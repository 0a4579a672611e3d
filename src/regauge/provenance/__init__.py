"""Where a model comes from: fingerprints that no gauge and no encoding changes, and an index of them."""

from regauge.provenance.fingerprint import Fingerprint, distance, fingerprint, same_function
from regauge.provenance.index import Hit, Index, Row

__all__ = ["Fingerprint", "Hit", "Index", "Row", "distance", "fingerprint", "same_function"]
