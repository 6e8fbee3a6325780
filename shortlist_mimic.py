"""An approximate shortlist, for knowledge bases that are too large even for one cheap pass over all entities.

Two parts of a score are dot products: that of the pooled texts, and that of the cross-modal vectors. `faiss` finds the
entities with the largest sum of the two, and only those are searched exactly. An entity can be missed if its score
comes mainly from its image or from the attention. How often that happens depends on the model, so measure the recall
against the exact search.
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

from .errors_mimic import EntityIndexError
from .files_mimic import file_facts, read_json, regular, write_json
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


def _width(store: Store) -> int:
    return shortlist_vectors(store.gather(slice(0, 1), _NAMES, torch.device("cpu"))).shape[1]


def _facts_path(path: Path) -> Path:
    """Where the size and the checksum of a shortlist's file are noted."""
    return path.with_suffix(".json")


def _damaged(path: Path | None, why: str) -> EntityIndexError:
    return EntityIndexError(f"The shortlist {path or ''} is damaged: {why}. Call build_shortlist() to make it again.")


class Shortlist:
    """A faiss index over the rows of an entity index."""

    def __init__(self, index: Any, path: Path | None = None) -> None:
        self.index, self._path = index, path

    @classmethod
    def build(cls, store: Store, factory: str | None, show_progress: bool) -> Shortlist:
        """Trains and fills an index; `factory` is faiss's description of it, such as "IVF1024,SQ8"."""
        faiss = _faiss()
        if factory is not None and not isinstance(factory, str):
            raise ValueError(f'`factory` must be a description of faiss such as "IVF1024,SQ8", got {factory!r}.')
        count = len(store)
        lists = max(1, int(4 * count**0.5))
        factory = factory or ("Flat" if count < _FLAT_BELOW else f"IVF{lists},SQ8")
        device = torch.device("cpu")
        width = _width(store)
        try:
            index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
            if not index.is_trained:
                sample = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: 40 * lists].sort().values
                index.train(shortlist_vectors(store.gather(sample, _NAMES, device)))
        except RuntimeError as error:
            removed = f" and {store.removed_count:,} removed ones" if store.removed_count else ""
            raise ValueError(
                f"faiss cannot make the index {factory!r} of {count - store.removed_count:,} entities{removed}: {error}"
            ) from error
        with tqdm(total=count, desc="Shortlist", unit=" entities", disable=not show_progress) as progress:
            for start in range(0, count, _BLOCK):
                stop = min(start + _BLOCK, count)
                index.add(shortlist_vectors(store.gather(slice(start, stop), _NAMES, device)))
                progress.update(stop - start)
        return cls(index)

    def save(self, path: Path) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        _faiss().write_index(self.index, str(temporary))
        facts = file_facts(temporary)
        os.replace(temporary, path)
        write_json(_facts_path(path), facts)

    @classmethod
    def load(cls, path: Path, store: Store) -> Shortlist:
        """Opens an index, memory-mapped, of the rows of a store.

        Raises:
            EntityIndexError: if the file is missing or damaged, or of other rows.
        """
        faiss = _faiss()
        try:
            index = faiss.read_index(str(regular(path)), faiss.IO_FLAG_MMAP)
            width = _width(store)
            if (index.d, index.ntotal, index.metric_type) != (width, len(store), faiss.METRIC_INNER_PRODUCT):
                raise ValueError(f"it holds {index.ntotal} rows of width {index.d}, not {len(store)} of {width}")
        except (OSError, RuntimeError, ValueError, MemoryError) as error:
            raise _damaged(path, str(error)) from error
        return cls(index, path)

    @staticmethod
    def verify(path: Path) -> None:
        """Compares a file with the checksum that was taken when it was written.

        Raises:
            EntityIndexError: if it differs, or the checksum cannot be read.
        """
        try:
            known, found = read_json(_facts_path(path)), file_facts(regular(path))
        except (OSError, ValueError) as error:
            raise _damaged(path, str(error)) from error
        if known != found:
            raise _damaged(path, "its checksum differs")

    def instead_of_all(
        self,
        store: Store,
        mentions: MentionFeatures,
        allowed: Sequence[Tensor | None],
        count: int,
        nprobe: int,
        least: int,
    ) -> list[Tensor | None]:
        """For each mention the rows that it may mean: those given, or the `count` of the shortlist, in order. Where the
        shortlist has fewer than `least`, though there are more, they are all, `None`."""
        result = list(allowed)
        free = [row for row, rows in enumerate(allowed) if rows is None]
        if not free:
            return result
        some = mentions[torch.tensor(free, device=mentions.device)]
        # More than are wanted, so that removed entities take no candidate's place.
        found = self.candidates(some.tensors, count + store.removed_count, nprobe)
        for row, candidates in zip(free, found, strict=True):
            candidates = candidates[candidates >= 0]
            if bool((candidates >= len(store)).any()):
                raise _damaged(self._path, "it names rows that there are not")
            candidates = candidates[~store.removed[candidates]][:count].sort().values
            if len(candidates) >= min(least, len(store) - store.removed_count):
                result[row] = candidates
        return result

    def candidates(self, mentions: dict[str, Tensor], count: int, nprobe: int) -> Tensor:
        """Rows of the `count` entities that score highest for each of M mentions, (M, count); -1 where there are fewer.

        `nprobe` is the number of an inverted file's lists that are read.
        """
        if hasattr(self.index, "nprobe"):
            self.index.nprobe = min(nprobe, self.index.nlist)
        if hasattr(self.index, "hnsw"):  # it finds no more than it keeps in view
            self.index.hnsw.efSearch = max(self.index.hnsw.efSearch, count)
        try:
            _, rows = self.index.search(shortlist_vectors(mentions), min(count, self.index.ntotal))
        except RuntimeError as error:
            raise _damaged(self._path, str(error)) from error
        return torch.from_numpy(rows)


__all__ = ["Shortlist", "shortlist_vectors"]
