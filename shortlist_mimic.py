"""An approximate shortlist for knowledge bases where even one cheap pass over all entities is too long.

Two parts of a score are dot products: of the pooled texts, and of the cross-modal vectors. `faiss` finds the entities
with the largest sum of the two, and only those are searched, exactly. Entities that only their image or the attention
speaks for can be missed: the recall against the exact answer depends on the model and must be measured.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .matching_mimic import HALF_UNITS, UNITS, MentionFeatures
from .store_mimic import Store

_NAMES = ("text_embed", "cross_modal")
_BLOCK = 8192
_FLAT_BELOW = 50_000


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "The approximate shortlist needs faiss: `pip install faiss-cpu` (or `mimic-el[faiss]`)."
        ) from error
    return faiss


def shortlist_vectors(tensors: dict[str, Tensor]) -> np.ndarray:
    """The vectors of entities, or of mentions, whose dot products are the shortlist's scores; float32 (B, d).

    A total score holds `<t_m, t_e> / 6 + <f_m, f_e> / 3`, so each side takes the square roots.
    """
    scales = (HALF_UNITS**-0.5, UNITS**-0.5)
    parts = [tensors[name].float() * scale for name, scale in zip(_NAMES, scales, strict=True)]
    return torch.cat(parts, dim=1).detach().cpu().contiguous().numpy()


class Shortlist:
    """A faiss index over the rows of an entity index."""

    def __init__(self, index: Any) -> None:
        self.index = index

    @classmethod
    def build(cls, store: Store, factory: str | None, show_progress: bool) -> Shortlist:
        """Trains and fills an index; `factory` is faiss's description of it, such as "IVF1024,SQ8"."""
        faiss = _faiss()
        count = len(store)
        lists = max(1, int(4 * count**0.5))
        factory = factory or ("Flat" if count < _FLAT_BELOW else f"IVF{lists},SQ8")
        device = torch.device("cpu")
        width = shortlist_vectors(store.gather(slice(0, 1), _NAMES, device)).shape[1]
        try:
            index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
            if not index.is_trained:
                sample = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: 40 * lists].sort().values
                index.train(shortlist_vectors(store.gather(sample, _NAMES, device)))
        except RuntimeError as error:
            raise ValueError(f"faiss cannot make the index {factory!r} of {count:,} entities: {error}") from error
        with tqdm(total=count, desc="Shortlist", unit=" entities", disable=not show_progress) as progress:
            for start in range(0, count, _BLOCK):
                stop = min(start + _BLOCK, count)
                index.add(shortlist_vectors(store.gather(slice(start, stop), _NAMES, device)))
                progress.update(stop - start)
        return cls(index)

    def save(self, path: Path) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        _faiss().write_index(self.index, str(temporary))
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> Shortlist:
        faiss = _faiss()
        return cls(faiss.read_index(str(path), faiss.IO_FLAG_MMAP))

    def instead_of_all(
        self, store: Store, mentions: MentionFeatures, allowed: Sequence[Tensor | None], count: int, nprobe: int
    ) -> list[Tensor | None]:
        """For each mention the rows that it may mean: those given, or the `count` of the shortlist, in order."""
        result = list(allowed)
        free = [row for row, rows in enumerate(allowed) if rows is None]
        if not free:
            return result
        some = mentions[torch.tensor(free, device=mentions.device)]
        # More than are wanted, so that removed entities take no candidate's place.
        found = self.candidates(some.tensors, count + store.removed_count, nprobe)
        for row, candidates in zip(free, found, strict=True):
            candidates = candidates[candidates >= 0]
            result[row] = candidates[~store.removed[candidates]][:count].sort().values
        return result

    def candidates(self, mentions: dict[str, Tensor], count: int, nprobe: int) -> Tensor:
        """Rows of the `count` entities that score highest for each of M mentions, (M, count); -1 where there are fewer.

        `nprobe` is the number of an inverted file's lists that are read.
        """
        if hasattr(self.index, "nprobe"):
            self.index.nprobe = min(nprobe, self.index.nlist)
        _, rows = self.index.search(shortlist_vectors(mentions), min(count, self.index.ntotal))
        return torch.from_numpy(rows)


__all__ = ["Shortlist", "shortlist_vectors"]
