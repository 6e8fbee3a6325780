"""A knowledge base over several machines: parts of an index, each held by a Ray actor, that answer as one index does.

Needs Ray: `pip install "mimic-el[ray]"`. Parts are indexes of one model, made by builds of their own; each lies where
its actor can open it, in a directory or a Hub repository.
"""

from .index import RayEntityIndex

__all__ = ["RayEntityIndex"]
