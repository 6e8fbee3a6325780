"""An approximate first stage for knowledge bases where even one cheap pass over all entities is too long.

Two parts of a score are dot products: of the pooled texts, and of the cross-modal vectors. `faiss` finds the entities
with the largest sum of the two, and only those are searched, exactly. Entities that only their picture or the attention
speaks for can be missed: the recall against the exact answer depends on the model and must be measured.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from .store_mimic import Store

_NAMES = ("text_embed", "cross_modal")
_BLOCK = 8192
_FLAT_BELOW = 50_000


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "The approximate first stage needs faiss: `pip install faiss-cpu` (or `mimic-el[faiss]`)."
        ) from error
    return faiss


def first_stage_vectors(tensors: dict[str, Tensor]) -> np.ndarray:
    """The vectors of entities, or of mentions, whose dot products are the stage's scores; float32 (B, d).

    A total score holds `<t_m, t_e> / 6 + <f_m, f_e> / 3`, so each side takes the square roots.
    """
    scales = (6**-0.5, 3**-0.5)
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
        width = first_stage_vectors(store.gather(slice(0, 1), _NAMES, device)).shape[1]
        try:
            index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise ValueError(f"faiss does not know the index {factory!r}: {error}") from error
        if not index.is_trained:
            sample = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: 40 * lists].sort().values
            index.train(first_stage_vectors(store.gather(sample, _NAMES, device)))
        with tqdm(total=count, desc="First stage", unit=" entities", disable=not show_progress) as progress:
            for start in range(0, count, _BLOCK):
                stop = min(start + _BLOCK, count)
                index.add(first_stage_vectors(store.gather(slice(start, stop), _NAMES, device)))
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

    def instead_of_all(self, store: Store, mentions: Any, allowed: list, count: int, nprobe: int) -> list:
        free = [row for row, rows in enumerate(allowed) if rows is None]
        if not free:
            return allowed
        found = self.candidates(mentions[torch.tensor(free)].tensors, count, nprobe)
        result = list(allowed)
        for row, candidates in zip(free, found.tolist(), strict=True):
            result[row] = torch.tensor(
                sorted(n for n in candidates if n >= 0 and not store.removed[n]), dtype=torch.long
            )
        return result

    def candidates(self, mentions: dict[str, Tensor], count: int, nprobe: int) -> Tensor:
        """Rows of the `count` entities that score highest for each of M mentions, (M, count); -1 where there are fewer.

        `nprobe` is the number of an inverted file's lists that are looked at.
        """
        if hasattr(self.index, "nprobe"):
            self.index.nprobe = min(nprobe, self.index.nlist)
        _, rows = self.index.search(first_stage_vectors(mentions), min(count, self.index.ntotal))
        return torch.from_numpy(rows)


__all__ = ["Shortlist", "first_stage_vectors"]
