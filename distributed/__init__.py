"""A knowledge base over several machines: Ray actors hold the parts of an index, which answer like one index.

Needs Ray: `pip install "mimic-el[ray]"`. The parts are indexes of one model, built separately. Each must be in a place
where its actor can open it: a directory or a Hub repository.
"""

from .index import RayEntityIndex

__all__ = ["RayEntityIndex"]
