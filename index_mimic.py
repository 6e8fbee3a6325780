"""A knowledge base, encoded once: built, stored, changed and searched."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import operator
import os
import re
import secrets
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import WeakFileLock, validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .configuration_mimic import MimicConfig
from .errors_mimic import EntityIndexError, MimicImageError, UnknownEntityError
from .images_mimic import first_image
from .index_card_mimic import _index_card, _TableFacts
from .matching_mimic import Matcher, MentionFeatures
from .modeling_mimic import MimicModel
from .processing_mimic import MimicProcessor
from .search_mimic import ChosenRows, Searcher, SearchStats, score_pairs
from .shortlist_mimic import FirstStage
from .store_mimic import (
    _check_shards,
    _file_facts,
    _layout,
    _make_shard,
    _mention_layout,
    _no_space,
    _quantised,
    _read_shard,
    _Shard,
    _shard_files,
    _Store,
    _table_line,
    _write_atomically,
    _write_shard,
)

_FORMAT = "mimic-entity-index"
_VERSION = 1
_MANIFEST = "index_config.json"
_BUILD_STATE = "build_state.json"
_LOCK = ".lock"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
_SHARD_ENTITIES = 8192
_LOCK_SECONDS = 10.0
_MENTION_BLOCK = 256
_CANDIDATE_BYTES = 64 * 2**20
# Of so many candidates, bounding their scores takes less time than scoring them all.
_MANY_CANDIDATES = 2048
_OPENINGS = 10
_RECORDS_AT_ONCE = 512
_PART = re.compile(r"(shard|removed|matcher|first-stage)-[0-9a-z-]+\.(safetensors|jsonl|faiss)")
# Ours, and those that safetensors makes while it writes.
_TEMPORARY = re.compile(
    rf"\.({_PART.pattern}|{_MANIFEST}|{_BUILD_STATE}|README\.md)\.[0-9]+\.tmp|\.tmp[A-Za-z0-9]{{6}}"
)


@dataclass
class SearchResult:
    """The best entities of M mentions, best first.

    Args:
        entity_ids (`list[list[str]]`): ids, k of each mention; fewer where the knowledge base or the candidates are
            fewer.
        scores, text_scores, image_scores, cross_modal_scores (`numpy.ndarray` of shape `(M, k)`, float32): the total
            and each unit's scores; NaN where there is no entity.
        stats ([`SearchStats`]): how many pairs were scored exactly.
    """

    entity_ids: list[list[str]]
    scores: np.ndarray
    text_scores: np.ndarray
    image_scores: np.ndarray
    cross_modal_scores: np.ndarray
    stats: SearchStats


@dataclass
class RankResult:
    """The ranks of M mentions' answers among all entities.

    Args:
        ranks (`numpy.ndarray` of shape `(M,)`, float64): from 1; among equal scores the mean of the best and the
            worst position; NaN where the answer is not in the knowledge base.
        stats ([`SearchStats`]): how many pairs were scored exactly.
    """

    ranks: np.ndarray
    stats: SearchStats


# --- Which model ----------------------------------------------------------------------------------------------------


def _fingerprint(config: Any, matcher: Matcher) -> str:
    """What tells models apart: the configuration, and the weights of the matcher."""
    digest = hashlib.sha256(json.dumps(_model_config(config), sort_keys=True).encode())
    for name, tensor in sorted(matcher.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _model_config(config: MimicConfig) -> dict[str, Any]:
    """The part of a configuration that the features depend on."""
    backbone: Any = config.backbone_config
    own = ("image_hidden_size", "tglu_hidden_size", "vdlu_hidden_size", "cmfu_hidden_size", "text_max_length")
    names = (*own, "layer_norm_eps", "mask_text_padding")
    result: dict[str, Any] = {name: getattr(config, name) for name in names}
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
    text, vision = backbone.text_config, backbone.vision_config
    result["backbone_config"] = {
        "projection_dim": backbone.projection_dim,
        "text_config": {name: getattr(text, name) for name in (*sizes, "vocab_size", "max_position_embeddings")},
        "vision_config": {name: getattr(vision, name) for name in (*sizes, "image_size", "patch_size")},
    }
    return result


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the names of the directories that it was loaded from."""
    parts = {name: _without_paths(value) if isinstance(value, dict) else value for name, value in config.items()}
    parts.pop("_name_or_path", None)
    return parts


def _probe(model: MimicModel) -> dict[str, Any]:
    """A sample of the encoder's weights; with the fingerprint of the matcher it tells models apart.

    Hashing all of an encoder would take as long as a search. What training changes it changes everywhere.
    """
    samples, dtype = [], ""
    for parameter in model.encoder.parameters():
        flat = parameter.detach().flatten()
        samples.append(flat[:: max(1, len(flat) // 16)][:16].float().cpu())
        dtype = dtype or str(parameter.dtype).removeprefix("torch.")
    values = torch.cat(samples).numpy()
    few = values[:: max(1, len(values) // 64)]
    return {"dtype": dtype, "sha256": hashlib.sha256(values.tobytes()).hexdigest(), "values": few.tolist()}


def _name_of(model: MimicModel) -> str:
    """The model's Hub id, or its directory's absolute path, which no Hub id looks like."""
    name = str(model.config.name_or_path or type(model).__name__)
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _same_probe(one: Any, other: Mapping[str, Any]) -> bool:
    if not isinstance(one, Mapping) or one.keys() != other.keys():
        return False
    if one["dtype"] == other["dtype"]:
        return one["sha256"] == other["sha256"]
    # The same model in another precision: its weights are rounded.
    here, there = one["values"], other["values"]
    return len(here) == len(there) and bool(np.allclose(here, there, rtol=1e-2, atol=1e-4))


# --- Reading a knowledge base -------------------------------------------------------------------------------------


class _Rows:
    """A knowledge base of records that can be read by number, or only one after the other."""

    def __init__(self, entities: Any) -> None:
        if isinstance(entities, Mapping):
            raise ValueError("A knowledge base is a list or data set of records with `id`, not a single dict.")
        entities = _undecoded(entities, "images")
        self.total = len(entities) if hasattr(entities, "__len__") else None
        self._by_number = entities if self.total is not None and hasattr(entities, "__getitem__") else None
        self._iterator = None if self._by_number is not None else iter(entities)
        # A generator can be read only once.
        self.again = self._iterator is not entities
        self._next = 0

    @property
    def at_once(self) -> int | None:
        """How many records may be taken at a time: those that are read by number stay where they are."""
        return None if self._by_number is not None else _RECORDS_AT_ONCE

    def skip(self, count: int) -> Iterator[Mapping[str, Any]]:
        """Passes over the next records and gives them, perhaps without their pictures."""
        if self._by_number is None:
            yield from itertools.islice(cast(Any, self._iterator), count)
            return
        span = self.take(count)
        if hasattr(span.records, "select_columns"):
            # Without this a data set would read the pictures too.
            names = [name for name in span.records.column_names if name != "images"]
            span = _Span(span.records.select_columns(names), span.start, span.stop)
        for row in range(len(span)):
            yield span[row]

    def take(self, count: int) -> Any:
        """The next records, at most `count`; something with a length that is read by number."""
        if self._by_number is None:
            return list(itertools.islice(cast(Any, self._iterator), count))
        first, self._next = self._next, self._next + count
        return _Span(self._by_number, first, min(self._next, cast(int, self.total)))


class _Span:
    """Some records of a sequence, read when asked for: in a worker process, that is."""

    def __init__(self, records: Any, start: int, stop: int) -> None:
        self.records, self.start, self.stop = records, start, max(start, stop)

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self.records[self.start + row]


def _undecoded(dataset: Any, column: str) -> Any:
    """A data set with its pictures as bytes: they are decoded by our own reader, with its limits."""
    features = getattr(dataset, "features", None)
    if features is None or column not in features or not hasattr(dataset, "cast_column"):
        return dataset
    wrapped = features[column]
    image = getattr(wrapped, "feature", wrapped)
    if type(image).__name__ != "Image":
        return dataset
    plain = type(image)(decode=False)
    return dataset.cast_column(column, plain if wrapped is image else dataclasses.replace(wrapped, feature=plain))


class _Collate:
    """Turns records into what the table keeps and what the model reads; runs in worker processes."""

    def __init__(self, processor: MimicProcessor, on_image_error: str) -> None:
        self.processor, self.on_image_error = processor, on_image_error

    def __call__(self, records: list[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Tensor], list[str]]:
        """The table's records, the model's inputs, and what is to be warned of."""
        kept = [_table_record(record) for record in records]
        names, descriptions = ([record[name] for record in kept] for name in ("name", "description"))
        inputs = dict(self.processor.process_entities(names, descriptions))
        troubles = []
        for row, record in enumerate(records):
            picture = first_image(record.get("images"))
            if picture is None:
                continue
            try:
                # One at a time: a picture may take a hundred times as much memory as its file.
                inputs["pixel_values"][row] = self.processor.pixels([picture])[0]
            except MimicImageError as error:
                message = f"Entity {kept[row]['id']!r}: {error}"
                if self.on_image_error == "raise":
                    raise MimicImageError(message) from error
                troubles.append(f"{message} It is encoded without a picture.")
        return kept, inputs, troubles


def _table_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the table keeps of a record: id, name, description, and other plain fields."""
    if not isinstance(record, Mapping) or record.get("id") is None:
        raise ValueError(
            f"Every entity needs an `id`; this record has none: {str(record)[:200]}. The fields are id, name, "
            "description and images."
        )
    kept: dict[str, Any] = {"id": str(record["id"]), "name": "", "description": ""}
    for name, value in record.items():
        if name in ("id", "images") or value is None:
            continue
        if name in ("name", "description") and not isinstance(value, str):
            raise ValueError(f"Entity {kept['id']!r}: `{name}` must be a string, got {type(value).__name__}.")
        if isinstance(value, str | int | bool) or (isinstance(value, float) and math.isfinite(value)):
            kept[name] = value
    try:
        _table_line(kept)
    except UnicodeEncodeError as error:
        raise ValueError(f"Entity {kept['id']!r} has text that is not valid Unicode: {error}.") from error
    return kept


# --- The index ----------------------------------------------------------------------------------------------------


class EntityIndex:
    """A knowledge base encoded by a [`MimicModel`], to be searched for the entities that mentions mean.

    An index lives in memory, or in a directory that is memory-mapped: opening it reads next to nothing. It keeps what
    scoring needs of the model, so that the features of mentions are all that a search takes; [`check_model`] tells
    whether a model is the one that made the index.

    Example:

    ```python
    >>> index = EntityIndex.build(model, processor, knowledge_base, "my-index")
    >>> mentions = model.encode_mentions(**processor.process_mentions(["Orange"], ["Orange opened a shop."], [photo]))
    >>> index.search(mentions, top_k=3).entity_ids
    [['brand:orange', 'emoji:1f34a', 'emoji:1f7e0']]
    ```

    Made by [`EntityIndex.build`] and [`EntityIndex.from_pretrained`].
    """

    def __init__(
        self, matcher: Matcher, manifest: dict[str, Any], store: _Store, directory: Path | None = None
    ) -> None:
        self._matcher = matcher.eval().requires_grad_(False)
        self._manifest = manifest
        self._store = store
        self._directory = directory
        self._read_only = False
        self._first_stage: FirstStage | None = None
        with torch.no_grad():
            self._mention_layout = _mention_layout(matcher)

    def __reduce__(self) -> Any:
        # A worker process opens a stored index itself; memory-mapped files cannot be sent to it.
        if self._directory is None:
            return type(self), (self._matcher, self._manifest, self._store)
        return _reopened, (type(self), self._directory, self._read_only)

    # --- What it holds

    def __len__(self) -> int:
        """The number of entities."""
        return len(self._store) - self._store.removed_count

    def __contains__(self, entity_id: object) -> bool:
        return isinstance(entity_id, str) and self._store.row(entity_id) is not None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The entities' own data, as [`entity`] gives it."""
        return self._store.records()

    def __repr__(self) -> str:
        place = "in memory" if self._directory is None else str(self._directory)
        return f"EntityIndex({len(self):,} entities, {self.dtype}, {self.bytes_per_entity:,.0f} bytes each, {place})"

    @property
    def dtype(self) -> str:
        """What the features are stored in: "float32", "float16" or "int8"."""
        return self._manifest["dtype"]

    @property
    def bytes_per_entity(self) -> float:
        """Bytes of features for each stored entity, its own data not counted."""
        return self._store.feature_bytes / max(1, len(self._store))

    @property
    def directory(self) -> Path | None:
        """Where the index is stored; `None` if it is in memory."""
        return self._directory

    def entity(self, entity_id: str) -> dict[str, Any]:
        """The data of an entity: `id`, `name`, `description` and the other plain fields that it was built with.

        Raises:
            UnknownEntityError: if there is no such entity.
        """
        return self._store.record(self._required_rows([entity_id])[0])

    def _required_rows(self, entity_ids: Iterable[str]) -> list[int]:
        rows, missing = [], []
        for entity_id in entity_ids:
            row = self._store.row(str(entity_id))
            if row is None:
                missing.append(str(entity_id))
            else:
                rows.append(row)
        if missing:
            shown = ", ".join(repr(name) for name in missing[:5]) + (" ..." if len(missing) > 5 else "")
            raise UnknownEntityError(f"{len(missing)} of the entities are not in this index of {len(self):,}: {shown}")
        return rows

    def check_model(self, model: MimicModel) -> None:
        """Makes sure that a model is the one whose features this index holds.

        Raises:
            EntityIndexError: if it is another.
        """
        made_by = self._manifest["model"]
        same = made_by["fingerprint"] == _fingerprint(model.config, model.matcher)
        if not same or not _same_probe(made_by["probe"], _probe(model)):
            raise EntityIndexError(
                f"This index was made by the model {made_by['name']!r}, and the model {_name_of(model)!r} has other "
                "weights or another configuration: its scores would mean nothing. Use the model that made the index, "
                "or build the index again with EntityIndex.build(model, processor, entities, output_dir)."
            )

    # --- Search

    def search(
        self,
        mentions: MentionFeatures,
        top_k: int = 10,
        *,
        candidates: Sequence[Sequence[str] | None] | None = None,
        exact: str = "certified",
        first_stage: int | None = None,
        probes: int = 32,
        show_progress: bool = False,
    ) -> SearchResult:
        """Finds the entities that fit each mention best; exactly, unless a first stage is asked for.

        Args:
            mentions ([`MentionFeatures`]): M mentions, from [`MimicModel.encode_mentions`]. The work is done on their
                device.
            top_k: number of entities wanted; all, if the knowledge base has fewer.
            candidates: for each mention the ids of the entities that it may mean, or `None` for all.
            exact: "certified" scores only those pairs whose bound leaves them in question, "exhaustive" scores all.
                The answers are the same.
            first_stage: number of entities that an approximate first stage leaves of each mention's, to be scored
                exactly; needs `faiss`, and is for knowledge bases of 10^7 entities and more. See [`build_first_stage`].
            probes: of the first stage, the number of an inverted file's lists that are looked at.
            show_progress: whether to show a progress bar.

        Raises:
            ValueError: if `top_k`, `exact` or `first_stage` is not valid, or the numbers of mentions and candidates
                differ.
            UnknownEntityError: if a candidate is not in the index.
            EntityIndexError: if the index is empty.
        """
        mentions = self._checked(mentions, exact)
        if isinstance(top_k, bool) or not hasattr(top_k, "__index__") or top_k < 1:
            raise ValueError(f"`top_k` must be a positive integer, got {top_k!r}.")
        top_k = operator.index(top_k)
        if first_stage is not None and (not isinstance(first_stage, int) or first_stage < top_k):
            raise ValueError(f"`first_stage` must be an integer of at least `top_k` ({top_k}), got {first_stage!r}.")
        count = len(mentions)
        if candidates is None:
            candidates = [None] * count
        if len(candidates) != count:
            raise ValueError(f"There are {count} mentions, but candidates for {len(candidates)}.")
        device = mentions.tensors["text_embed"].device
        rows = torch.full((count, min(top_k, len(self))), -1, dtype=torch.long, device=device)
        searcher = self._searcher(device)
        chosen = [row for row, item in enumerate(candidates) if item is not None]
        free = [row for row, item in enumerate(candidates) if item is None]
        with torch.inference_mode():
            if first_stage is not None and free:
                self._first_stage_search(mentions, free, first_stage, probes, searcher, rows)
                free = []
            for picked, part, progress in self._mention_blocks(mentions, free, "Searching", show_progress):
                top = searcher.top_k(part, rows.shape[1], exact == "exhaustive", progress.update)
                rows[picked] = top.rows
            for row in chosen:
                found = self._among(mentions, row, cast(Sequence[str], candidates[row]), rows.shape[1], searcher)
                rows[row, : len(found)] = found
            return self._result(mentions, rows, searcher)

    def _among(self, mentions: MentionFeatures, row: int, ids: Sequence[str], k: int, searcher: Searcher) -> Tensor:
        """Rows of the best of given candidates, best first."""
        if isinstance(ids, str):
            raise ValueError(f"Candidates must be a list of entity ids for each mention, got the string {ids!r}.")
        return self._best_of(mentions, row, sorted(set(self._required_rows(ids))), k, searcher)

    def _best_of(self, mentions: MentionFeatures, row: int, rows: list[int], k: int, searcher: Searcher) -> Tensor:
        """Rows of the k best of some entities for one mention, best first."""
        device = mentions.tensors["text_embed"].device
        wanted = torch.tensor(rows, dtype=torch.long)
        if len(rows) > max(_MANY_CANDIDATES, k):
            among = dataclasses.replace(searcher, blocks=ChosenRows(self._store, wanted))  # with the same stats
            found = among.top_k(mentions[row : row + 1], k, exhaustive=False, advance=lambda _: None).rows[0]
            return wanted[found.cpu()].to(device)
        wanted = wanted.to(device)
        mention_rows = torch.full_like(wanted, row)
        scores = score_pairs(self._matcher_on(device), mentions, mention_rows, self._store, wanted, _CANDIDATE_BYTES)
        searcher.stats.pairs += len(wanted)
        searcher.stats.exact_pairs += len(wanted)
        return wanted[scores.total.argsort(descending=True, stable=True)][:k]

    def build_first_stage(self, factory: str | None = None, *, show_progress: bool = True) -> None:
        """Makes the approximate first stage of [`search`], and stores it beside the index.

        It is not part of the index: after a change of the index it has to be made again, and it is not uploaded.

        Args:
            factory: faiss's description of the index, such as "IVF4096,SQ8" or "HNSW32". By default an inverted file
                with 8-bit vectors, or, below 50,000 entities, a plain scan.

        Raises:
            ImportError: if faiss is not installed.
            ValueError: if faiss does not know the description.
        """
        self._first_stage = FirstStage.build(self._store, factory, show_progress)
        if self._directory is not None and not self._read_only:
            with _no_space(self._directory):
                self._first_stage.save(self._first_stage_path)

    @property
    def _first_stage_path(self) -> Path:
        return cast(Path, self._directory) / f"first-stage-{self._manifest['generation']:05d}.faiss"

    def _first_stage_search(
        self, mentions: MentionFeatures, chosen: list[int], count: int, probes: int, searcher: Searcher, rows: Tensor
    ) -> None:
        if self._first_stage is None:
            if self._directory is None or not self._first_stage_path.exists():
                raise EntityIndexError(
                    "This index has no first stage for its entities as they are now; call build_first_stage() first."
                )
            self._first_stage = FirstStage.load(self._first_stage_path)
        picked = torch.tensor(chosen, device=rows.device)
        found = self._first_stage.candidates(mentions[picked].tensors, count, probes)
        searcher.stats.pairs += len(chosen) * len(self._store)
        for row, candidates in zip(chosen, found.tolist(), strict=True):
            alive = sorted(number for number in candidates if number >= 0 and not self._store.removed[number])
            before = searcher.stats.pairs
            best = self._best_of(mentions, row, alive, rows.shape[1], searcher)
            searcher.stats.pairs = before
            rows[row, : len(best)] = best

    def _result(self, mentions: MentionFeatures, rows: Tensor, searcher: Searcher) -> SearchResult:
        """The scores of each unit for the pairs that were found."""
        mention_rows, places = (rows >= 0).nonzero(as_tuple=True)
        scores = score_pairs(
            self._matcher_on(rows.device),
            mentions,
            mention_rows,
            self._store,
            rows[mention_rows, places],
            _CANDIDATE_BYTES,
        )
        arrays = []
        for part in (scores.total, scores.text, scores.image, scores.cross_modal):
            full = torch.full(rows.shape, torch.nan, device=rows.device)
            full[mention_rows, places] = part
            arrays.append(full.cpu().numpy())
        ids = [[self._store.record(row)["id"] for row in found if row >= 0] for found in rows.tolist()]
        total, text, image, cross_modal = arrays
        return SearchResult(ids, total, text, image, cross_modal, searcher.stats)

    def rank(
        self,
        mentions: MentionFeatures,
        answers: Sequence[str | None],
        *,
        exact: str = "certified",
        show_progress: bool = False,
    ) -> RankResult:
        """The rank of each mention's answer among all entities, without a matrix of scores.

        Args:
            mentions ([`MentionFeatures`]): M mentions.
            answers: the id of each mention's entity. Where it is not in the index the rank is NaN.
            exact, show_progress: as in [`search`].

        Raises:
            ValueError: if the numbers of mentions and answers differ, or `exact` is not valid.
            EntityIndexError: if the index is empty.
        """
        mentions = self._checked(mentions, exact)
        if len(answers) != len(mentions):
            raise ValueError(f"There are {len(mentions)} mentions, but answers for {len(answers)}.")
        device = mentions.tensors["text_embed"].device
        answer_rows = [None if answer is None else self._store.row(str(answer)) for answer in answers]
        known = [row for row, answer in enumerate(answer_rows) if answer is not None]
        gold = torch.tensor([-1 if row is None else row for row in answer_rows], device=device)
        ranks = np.full(len(answers), np.nan)
        searcher = self._searcher(device)
        with torch.inference_mode():
            for picked, part, progress in self._mention_blocks(mentions, known, "Ranking", show_progress):
                above, equal = searcher.ranks(part, gold[picked], exact == "exhaustive", progress.update)
                ranks[picked.cpu().numpy()] = (1 + above + equal / 2).cpu().numpy()
        return RankResult(ranks, searcher.stats)

    def _checked(self, mentions: MentionFeatures, exact: str) -> MentionFeatures:
        if getattr(mentions, "side", None) != "mention":
            raise TypeError(
                f"An index is searched with MentionFeatures, from model.encode_mentions; got {type(mentions).__name__}."
            )
        if exact not in ("certified", "exhaustive"):
            raise ValueError(f'`exact` must be "certified" or "exhaustive", got {exact!r}.')
        if not len(self):
            raise EntityIndexError("This index has no entities, so there is nothing to search.")
        if _layout(mentions.tensors) != self._mention_layout:
            raise ValueError(
                f"These are not features of this index's model: their names or shapes differ ({mentions!r})."
            )
        for name, tensor in mentions.tensors.items():
            finite = torch.isfinite(tensor.flatten(1)).all(dim=1)
            if not bool(finite.all()):
                row = int((~finite).nonzero()[0])
                raise ValueError(f"The features of mention {row} are not finite (`{name}`): they have no order.")
        return mentions if mentions.tensors["text_embed"].dtype != torch.float64 else mentions.to(torch.float32)

    def _mention_blocks(
        self, mentions: MentionFeatures, rows: list[int], what: str, show_progress: bool
    ) -> Iterator[tuple[Tensor, MentionFeatures, Any]]:
        """Blocks of mentions, with a progress bar that counts pairs."""
        device = mentions.tensors["text_embed"].device
        total = len(rows) * len(self._store)
        with tqdm(total=total, desc=what, unit="pair", unit_scale=True, disable=not show_progress) as progress:
            for start in range(0, len(rows), _MENTION_BLOCK):
                picked = torch.tensor(rows[start : start + _MENTION_BLOCK], dtype=torch.long, device=device)
                yield picked, mentions[picked], progress

    def _searcher(self, device: torch.device) -> Searcher:
        # A CPU's cache holds the tensors of some 10^5 pairs; a GPU wants more at a time.
        return Searcher(self._matcher_on(device), self._store, sub_block=1024 if device.type == "cpu" else 8192)

    def _matcher_on(self, device: torch.device) -> Matcher:
        return self._matcher.to(device)

    # --- Build

    @classmethod
    def build(
        cls,
        model: MimicModel,
        processor: MimicProcessor,
        entities: Any,
        output_dir: str | os.PathLike[str] | None = None,
        *,
        dtype: str = "float16",
        batch_size: int = 64,
        num_workers: int = 0,
        on_image_error: str = "warn",
        overwrite: bool = False,
        shard_entities: int = _SHARD_ENTITIES,
        show_progress: bool = True,
    ) -> EntityIndex:
        """Encodes a knowledge base.

        With an `output_dir` memory stays bounded whatever the number of entities, and a build that was interrupted
        goes on where it stopped when the same call is made again.

        Args:
            model, processor: what encodes; the work is done on the model's device.
            entities: a `datasets.Dataset`, a list or any iterable of dicts with `id`, `name`, `description` and
                `images` (a list of pictures, of which the first is used; a single picture; or nothing). Other plain
                fields are kept with the entity.
            output_dir: where the index is stored; in memory if absent.
            dtype: "float32", "float16" or "int8".
            batch_size: entities encoded at a time.
            num_workers: processes that read and resize pictures beside the one that encodes.
            on_image_error: "warn" goes on without a picture that cannot be read, "raise" stops.
            overwrite: whether an index that is in `output_dir` is replaced, once the new one is complete; and
                whether an unfinished build of something else is given up.
            shard_entities: entities in a file, and those that an interruption may cost.
            show_progress: whether to show a progress bar.

        Raises:
            EntityIndexError: if there are no entities, `output_dir` already holds an index, or an unfinished build of
                other entities or of another model is there.
            ValueError: if an entity has no id, or two have the same.
        """
        if dtype not in _DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(_DTYPES)}, got {dtype!r}.")
        builder = _Builder(model, processor, dtype, batch_size, num_workers, on_image_error, shard_entities)
        manifest: dict[str, Any] = {
            "format": _FORMAT,
            "version": _VERSION,
            "generation": 1,
            "dtype": dtype,
            "model": {
                "name": _name_of(model),
                "fingerprint": _fingerprint(model.config, model.matcher),
                "probe": _probe(model),
                "config": _without_paths(model.config.to_dict()),
            },
            "removed": None,
        }
        if output_dir is None:
            shards = list(builder.shards(_Rows(entities), show_progress))
            if not shards:
                raise EntityIndexError("The knowledge base is empty: there is nothing to build an index of.")
            return cls(_copy_of(model.matcher, model.config), manifest, _Store(shards))
        directory = Path(output_dir)
        with _no_space(directory), _locked(directory):
            cls._build_in(directory, builder, manifest, model, entities, overwrite, show_progress)
        return cls.from_pretrained(directory)

    @staticmethod
    def _build_in(
        directory: Path,
        builder: _Builder,
        manifest: dict[str, Any],
        model: MimicModel,
        entities: Any,
        overwrite: bool,
        show_progress: bool,
    ) -> None:
        if (directory / _MANIFEST).exists() and not overwrite:
            raise EntityIndexError(
                f"{directory} already holds an index. Name another directory, or pass overwrite=True to replace it."
            )
        rows = _Rows(entities)
        state = {"build": secrets.token_hex(8), "dtype": manifest["dtype"], "model": manifest["model"], "shards": []}
        done: list[_Shard] = []
        if unfinished := _unfinished(directory):
            try:
                done = _resumed(directory, unfinished, state, rows)
                state = unfinished
            except EntityIndexError as error:
                if not overwrite:
                    raise
                if not rows.again:
                    (directory / _BUILD_STATE).unlink()
                    raise EntityIndexError(
                        f"The unfinished build in {directory} was given up, but the entities come from a generator, of "
                        "which some were read to compare them with it. Call build again with a new generator."
                    ) from error
                rows = _Rows(entities)

        def written(shard: _Shard) -> _Shard:
            state["shards"].append(_write_shard(directory, shard))
            _write_json(directory / _BUILD_STATE, state)
            return _read_shard(directory, state["shards"][-1])

        shards = [*done, *builder.shards(rows, show_progress, written, done)]
        if not shards:
            raise EntityIndexError("The knowledge base is empty: there is nothing to build an index of.")
        manifest |= {"build": state["build"], "shards": state["shards"], "generation": _next_generation(directory)}
        _publish(directory, manifest, _Store(shards), model.matcher)

    # --- Change

    def add(self, model: MimicModel, processor: MimicProcessor, entities: Any, **options: Any) -> None:
        """Adds entities; what is there is not encoded again. All are added, or none.

        Args:
            model, processor, entities: as in [`build`]; the ids must be new.
            **options: `batch_size`, `num_workers`, `on_image_error` and `show_progress` of [`build`].

        Raises:
            ValueError: if an id is already there, or twice among the new ones.
            EntityIndexError: if the model is not the index's, or another process is changing the index.
        """
        self._extend(model, processor, entities, replace=False, **options)

    def update(self, model: MimicModel, processor: MimicProcessor, entities: Any, **options: Any) -> None:
        """Replaces entities that are there by new versions of them. Arguments as of [`add`].

        Raises:
            UnknownEntityError: if an id is not there.
            ValueError, EntityIndexError: as in [`add`].
        """
        self._extend(model, processor, entities, replace=True, **options)

    def _extend(
        self,
        model: MimicModel,
        processor: MimicProcessor,
        entities: Any,
        replace: bool,
        batch_size: int = 64,
        num_workers: int = 0,
        on_image_error: str = "warn",
        show_progress: bool = True,
    ) -> None:
        self.check_model(model)
        builder = _Builder(model, processor, self.dtype, batch_size, num_workers, on_image_error, _SHARD_ENTITIES)
        with self._changing():
            new: list[tuple[_Shard, dict[str, Any] | None]] = []
            removed = self._store.removed.clone()

            def written(shard: _Shard) -> _Shard:
                # At once, so that memory stays bounded; the index knows of them only when all are there.
                new.append(self._written(shard))
                return new[-1][0]

            for shard in builder.shards(_Rows(entities), show_progress, written, index=self._store, replace=replace):
                if replace:
                    removed[self._required_rows(record["id"] for record in shard.table)] = True
            if new:
                removed = torch.cat([removed, torch.zeros(sum(len(s) for s, _ in new), dtype=torch.bool)])
                self._commit(self._pairs() + new, removed)

    def remove(self, entity_ids: Iterable[str]) -> None:
        """Removes entities: no search finds them any more. [`compact`] frees their space.

        Raises:
            UnknownEntityError: if an id is not there; then none is removed.
            EntityIndexError: if another process is changing the index.
        """
        if isinstance(entity_ids, str):
            raise ValueError(f"`remove` takes a list of entity ids, got the string {entity_ids!r}.")
        with self._changing():
            removed = self._store.removed.clone()
            removed[self._required_rows(entity_ids)] = True
            self._commit(self._pairs(), removed)

    def compact(self) -> None:
        """Frees the space of removed entities, and joins small files.

        Raises:
            EntityIndexError: if no entity is left, or another process is changing the index.
        """
        with self._changing():
            if not len(self):
                raise EntityIndexError("All entities of this index were removed; build a new one instead.")
            self._commit([self._written(shard) for shard in self._store.compacted(_SHARD_ENTITIES, _new_name)], None)

    def _pairs(self) -> list[tuple[_Shard, dict[str, Any] | None]]:
        entries = self._manifest.get("shards", [None] * len(self._store.shards))
        return list(zip(self._store.shards, entries, strict=True))

    def _written(self, shard: _Shard) -> tuple[_Shard, dict[str, Any] | None]:
        if self._directory is None:
            return shard, None
        entry = _write_shard(self._directory, shard)
        return _read_shard(self._directory, entry), entry

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Holds the index for one change: nobody else may change it, nor may it have changed since it was opened."""
        if self._directory is None:
            yield
            return
        if self._read_only:
            raise EntityIndexError(
                f"This index lies in the Hub's cache ({self._directory}), which must not be changed. Save it to a "
                "directory with save_pretrained and open it from there."
            )
        with _no_space(self._directory), _locked(self._directory):
            if _identity(_read_manifest(self._directory)) != _identity(self._manifest):
                raise EntityIndexError(
                    f"The index {self._directory} was changed by another process since it was opened. Open it again "
                    "with EntityIndex.from_pretrained and repeat the change."
                )
            try:
                yield
            except BaseException:
                with suppress(OSError, EntityIndexError):
                    _remove_strays(self._directory, _read_manifest(self._directory))
                raise

    def _commit(self, pairs: Sequence[tuple[_Shard, dict[str, Any] | None]], removed: Tensor | None) -> None:
        """Makes a change real: the manifest is replaced in one step, whatever it no longer names is deleted after."""
        store = _Store([shard for shard, _ in pairs], removed)
        manifest = {**self._manifest, "generation": self._manifest["generation"] + 1, "removed": None}
        if self._directory is not None:
            manifest["shards"] = [entry for _, entry in pairs]
            _publish(self._directory, manifest, store)
        self._manifest, self._store, self._first_stage = manifest, store, None

    # --- Save and load

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Stores the index in a directory; removed entities are left out.

        Args:
            save_directory: the directory; an index that is there is replaced, once this one is complete.
            push_to_hub: whether to upload it too, see [`push_to_hub`]; `repo_id` defaults to the directory's name.
            **kwargs: arguments of [`push_to_hub`].

        Raises:
            EntityIndexError: if no entity is left, or another process is changing an index there.
        """
        directory = Path(save_directory)
        if not len(self):
            raise EntityIndexError("All entities of this index were removed: there is nothing to save.")
        if self._directory is None or directory.resolve() != self._directory.resolve():
            with _no_space(directory), _locked(directory):
                manifest = {**self._manifest, "generation": _next_generation(directory)}
                shards = self._store.compacted(_SHARD_ENTITIES, _new_name)
                manifest["shards"] = [_write_shard(directory, shard) for shard in shards]
                store = _Store([_read_shard(directory, entry) for entry in manifest["shards"]])
                _publish(directory, manifest, store, self._matcher)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", directory.name), **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload entity index",
        model_id: str | None = None,
        license: str | None = None,
        source: str | None = None,
    ) -> str:
        """Uploads the index to a data set repository of its own, in one commit, and gives its address.

        Its entities then show in the Hub's data viewer, and `EntityIndex.from_pretrained(repo_id)` opens it. One model
        can serve several indexes. After an interruption the same call sends only what is not up yet. The page of the
        repository is written from what is in the index, and replaced at each upload.

        Args:
            repo_id: "user/name"; created if there is none.
            private: whether a repository that is created is private.
            token: as in `huggingface_hub.HfApi`.
            revision: the branch; it must exist. "main" by default.
            commit_message: title of the commit.
            model_id: Hub id of the model that made the index, for the page. Known already if the model was loaded
                from there.
            license: the licence of the entities' texts, as the Hub spells it ("cc-by-sa-4.0"), for the page.
            source: Hub id of the data set that the entities are from, for the page.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
        with self._for_hub(repo_id, model_id=model_id, license=license, source=source) as files:
            there = api.list_repo_files(repo_id, repo_type="dataset", revision=revision)
            info = api.create_commit(
                repo_id,
                [
                    *(CommitOperationAdd(name, content) for name, content in files.items()),
                    *(CommitOperationDelete(name) for name in there if _is_part(name) and name not in files),
                ],
                commit_message=commit_message,
                repo_type="dataset",
                revision=revision,
            )
        return str(info.commit_url)

    @contextmanager
    def _for_hub(
        self, repo_id: str, *, model_id: str | None = None, license: str | None = None, source: str | None = None
    ) -> Iterator[dict[str, Path | bytes]]:
        """The content of each file of a repository of this index; arguments as of [`push_to_hub`]."""
        with tempfile.TemporaryDirectory() as scratch:
            directory, store = self._directory, self._store
            if directory is None or store.removed_count:
                directory = Path(scratch)
                self.save_pretrained(directory)
                store = EntityIndex.from_pretrained(directory)._store
            manifest = _read_manifest(directory)
            made_by = manifest["model"]["name"]
            model_id = model_id or _hub_id(made_by)
            # A path on this machine is nothing to publish.
            manifest["model"]["name"] = model_id or Path(made_by).name
            card = _card_of(repo_id, manifest, store, model_id=model_id, license=license, source=source)
            yield {
                **{name: directory / name for name in _files_of(manifest)},
                _MANIFEST: _json_text(manifest).encode(),
                "README.md": card.encode(),
            }

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        subfolder: str = "",
        repo_type: str = "dataset",
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> EntityIndex:
        """Opens an index: its features are memory-mapped and read when a search needs them.

        From the Hub, the index's files and no others are downloaded, all of one commit.

        Args:
            name_or_path: a directory, or the id of a Hub repository that [`push_to_hub`] made.
            subfolder: the folder of the index within it.
            repo_type: "dataset", which is what [`push_to_hub`] makes, or "model" for an index that was uploaded in a
                folder of its model's repository.
            revision, cache_dir, token, local_files_only, force_download: as in `huggingface_hub.snapshot_download`.

        Raises:
            EntityIndexError: if there is no index, its build is unfinished, it is damaged, or of a newer format.
            huggingface_hub.errors.HfHubHTTPError: if the Hub does not give it: the token is wrong, the repository is
                gated, or there is no such revision.
        """
        directory = Path(name_or_path)
        read_only = not directory.exists()
        if read_only:
            options = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
            directory = _downloaded(
                str(name_or_path), repo_type, subfolder, revision, force_download=force_download, **options
            )
        else:
            directory = directory / subfolder
        for _ in range(_OPENINGS):
            manifest = _read_manifest(directory)
            try:
                index = cls._opened(directory, manifest)
                break
            except EntityIndexError:
                # Another process may have replaced the files since their list was read.
                if _identity(_read_manifest(directory)) == _identity(manifest):
                    raise
        else:
            raise EntityIndexError(f"The index {directory} is being changed again and again; try later.")
        index._read_only = read_only
        return index

    @classmethod
    def _opened(cls, directory: Path, manifest: dict[str, Any]) -> EntityIndex:
        shards = [_read_shard(directory, entry) for entry in manifest["shards"]]
        removed = _read_removed(directory, manifest["removed"], sum(len(shard) for shard in shards))
        matcher = _read_matcher(directory, manifest)
        _check_shards(shards, matcher, _DTYPES[manifest["dtype"]], directory)
        return cls(matcher, manifest, _Store(shards, removed), directory)

    def verify(self) -> None:
        """Reads every file of a stored index and compares it with the checksum that was taken when it was written.

        Raises:
            EntityIndexError: if a file differs.
        """
        if self._directory is None:
            return
        files = dict(self._manifest.get("files", {}))
        for entry in self._manifest["shards"]:
            files |= entry["files"]
        for file, expected in files.items():
            path = self._directory / file
            if not path.is_file():
                raise EntityIndexError(f"{path} is missing. Restore the file, or build the index again.")
            if _file_facts(path) != expected:
                raise EntityIndexError(
                    f"{path} is not what was written: its checksum differs. Restore the file, or build the index again."
                )


# --- Building -----------------------------------------------------------------------------------------------------


@dataclass
class _Builder:
    model: MimicModel
    processor: MimicProcessor
    dtype: str
    batch_size: int
    num_workers: int
    on_image_error: str
    shard_entities: int

    def __post_init__(self) -> None:
        for name in ("batch_size", "shard_entities"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be a positive integer, got {getattr(self, name)!r}.")
        if self.on_image_error not in ("raise", "warn"):
            raise ValueError(f'`on_image_error` must be "raise" or "warn", got {self.on_image_error!r}.')

    def shards(
        self,
        rows: _Rows,
        show_progress: bool,
        keep: Callable[[_Shard], _Shard] = lambda shard: shard,
        done: Sequence[_Shard] = (),
        index: _Store | None = None,
        replace: bool = False,
    ) -> Iterator[_Shard]:
        """Encodes the rest of the rows, a shard at a time.

        Args:
            keep: stores a shard, and gives it as it is stored; the one in memory is let go.
            done: shards of the rows before, whose ids must not come again.
            index: what the shards are to be added to; its ids must not come again either, unless they are to be
                replaced.
        """
        seen = _SeenIds(done, None if replace else index)
        number = len(done) + (len(index.shards) if index else 0)
        finished = sum(len(shard) for shard in done)
        was_training = self.model.training
        self.model.eval()
        progress = tqdm(
            total=rows.total, initial=finished, desc="Encoding entities", unit=" entities", disable=not show_progress
        )
        try:
            with progress:
                while shard := self._shard(rows, _new_name(number), progress):
                    seen.check(shard)
                    shard = keep(shard)
                    seen.shards.append(shard)
                    number += 1
                    yield shard
        finally:
            self.model.train(was_training)

    def _shard(self, rows: _Rows, name: str, progress: Any) -> _Shard | None:
        kept: list[dict[str, Any]] = []
        parts: list[dict[str, Tensor]] = []
        while (left := self.shard_entities - len(kept)) and len(records := rows.take(min(rows.at_once or left, left))):
            self._encode(records, kept, parts, progress)
        if not kept:
            return None
        return _make_shard(name, {key: torch.cat([part[key] for part in parts]) for key in parts[0]}, kept)

    def _encode(self, records: Any, kept: list[dict[str, Any]], parts: list[dict[str, Tensor]], progress: Any) -> None:
        """Appends what the table keeps of some records, and their features."""
        order = self._order(records)
        loader = DataLoader(
            records,
            batch_size=self.batch_size,
            sampler=order,
            num_workers=self.num_workers,
            collate_fn=_Collate(self.processor, self.on_image_error),
            worker_init_fn=_quiet_tokenizers,
        )
        encoded: list[dict[str, Any]] = []
        batches: list[dict[str, Tensor]] = []
        device = self.model.device
        for batch_records, inputs, troubles in loader:
            for trouble in troubles:
                warnings.warn(trouble, stacklevel=2)
            with torch.inference_mode():
                features = self.model.encode_entities(**{name: t.to(device) for name, t in inputs.items()})
                batches.append(_quantised(features, self.model.matcher, _DTYPES[self.dtype]))
            encoded.extend(batch_records)
            progress.update(len(batch_records))
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(len(order))
        parts.append({name: torch.cat([batch[name] for batch in batches])[back] for name in batches[0]})
        kept.extend(encoded[row] for row in back.tolist())

    def _order(self, records: Any) -> list[int]:
        """The order of encoding: by length, where the model can leave padding out."""
        rows = list(range(len(records)))
        if not self.model.config.mask_text_padding:
            return rows
        texts = records
        if isinstance(records, _Span) and hasattr(records.records, "select_columns"):
            names = [name for name in records.records.column_names if name in ("id", "name", "description")]
            texts = _Span(records.records.select_columns(names), records.start, records.stop)
        kept = [_table_record(texts[row]) for row in rows]
        lengths = [len(record["name"]) + len(record["description"]) for record in kept]
        return sorted(rows, key=lengths.__getitem__)


class _SeenIds:
    """Refuses an id that was there before, in shards or in a store."""

    def __init__(self, shards: Sequence[_Shard], store: _Store | None) -> None:
        self.shards, self._store = list(shards), store

    def check(self, shard: _Shard) -> None:
        for hashed in np.unique(shard.hashes[1:][shard.hashes[1:] == shard.hashes[:-1]]):
            ids = _ids_with(shard, hashed)
            for entity_id in ids:
                if ids.count(entity_id) > 1:
                    raise ValueError(_duplicate(entity_id))
        for before in self.shards:
            for entity_id in _common_ids(before, shard):
                raise ValueError(_duplicate(entity_id))
        for before in self._store.shards if self._store else []:
            for entity_id in _common_ids(before, shard):
                # One that was removed is free again.
                if self._store is not None and self._store.row(entity_id) is not None:
                    raise ValueError(_duplicate(entity_id))


def _common_ids(one: _Shard, other: _Shard) -> Iterator[str]:
    places = np.searchsorted(one.hashes, other.hashes).clip(max=len(one) - 1)
    for hashed in np.unique(other.hashes[one.hashes[places] == other.hashes]):
        for entity_id in _ids_with(other, hashed):
            if one.rows_of(entity_id, int(hashed)):
                yield entity_id


def _ids_with(shard: _Shard, hashed: Any) -> list[str]:
    return [shard.table[int(row)]["id"] for row in shard.hash_rows[shard.hashes == hashed]]


def _duplicate(entity_id: str) -> str:
    return (
        f"The id {entity_id!r} is there more than once. Ids tell entities apart: make them unique, or, to replace an "
        "entity that an index has, use EntityIndex.update."
    )


def _quiet_tokenizers(_: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _new_name(number: int) -> str:
    """A name that no other shard has or had; in the order of names the shards are in the order of entities."""
    return f"shard-{number:06d}-{secrets.token_hex(6)}"


def _unfinished(directory: Path) -> dict[str, Any] | None:
    """The state of a build that was interrupted before its index was there."""
    path = directory / _BUILD_STATE
    if not path.exists():
        return None
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        files = [name for entry in state["shards"] for name in _shard_files(entry["name"])]
        known = isinstance(state["build"], str) and isinstance(files, list)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise EntityIndexError(
            f"{path} cannot be read: {error!r}. Delete it, and the build starts from the beginning."
        ) from error
    with suppress(EntityIndexError):
        # Interrupted between the last two steps.
        known = known and _read_manifest(directory).get("build") != state["build"]
    return state if known else None


def _resumed(directory: Path, state: dict[str, Any], fresh: dict[str, Any], rows: _Rows) -> list[_Shard]:
    """The finished shards of an unfinished build, if it is of the same entities and model; the rows are passed over."""
    try:
        was, now = state["model"], fresh["model"]
        same = was["fingerprint"] == now["fingerprint"] and _same_probe(was["probe"], now["probe"])
        same = same and state["dtype"] == fresh["dtype"]
        entries = [(entry, entry["files"][_shard_files(entry["name"])[1]]["sha256"]) for entry in state["shards"]]
        counts = [int(entry["count"]) for entry in state["shards"]]
    except (KeyError, TypeError, ValueError) as error:
        raise EntityIndexError(
            f"{directory / _BUILD_STATE} is damaged: {error!r}. Delete it, and the build starts from the beginning."
        ) from error
    for (_, expected), count in zip(entries, counts, strict=True):
        if not same:
            break
        digest = hashlib.sha256()
        for record in rows.skip(count):
            digest.update(_table_line(_table_record(record)))
        same = digest.hexdigest() == expected
    if not same:
        raise EntityIndexError(
            f"{directory} holds an unfinished build of another model, of another precision, or of other entities. "
            "Build into another directory, or pass overwrite=True to give that build up."
        )
    return [_read_shard(directory, entry) for entry, _ in entries]


# --- Files --------------------------------------------------------------------------------------------------------


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with WeakFileLock(directory / _LOCK, timeout=_LOCK_SECONDS):
            yield
    except TimeoutError as error:
        raise EntityIndexError(
            f"Another process is building or changing the index {directory}. Wait for it to end, and try again."
        ) from error


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _json_text(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)


def _write_json(path: Path, value: Any) -> None:
    _write_atomically(path, lambda temporary: _write_text(temporary, _json_text(value)))


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / _MANIFEST
    if not path.is_file():
        if (directory / _BUILD_STATE).exists():
            raise EntityIndexError(
                f"The build of the index {directory} was interrupted. Run the same EntityIndex.build again: it goes on "
                "where it stopped."
            )
        raise EntityIndexError(f"There is no entity index in {directory}: it has no {_MANIFEST}.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = manifest.get("format") == _FORMAT
        version = manifest.get("version")
    except (ValueError, AttributeError, RecursionError) as error:
        raise EntityIndexError(f"{path} is damaged: {error}. Build the index again.") from error
    if not known or not isinstance(version, int):
        raise EntityIndexError(f"{path} does not describe an entity index.")
    if version > _VERSION:
        raise EntityIndexError(
            f"The index {directory} has the format {version}, newer than the {_VERSION} that this version reads. "
            "Update the code that reads it."
        )
    if wrong := _wrong_part(manifest):
        raise EntityIndexError(f"{path} is damaged: its `{wrong}` is missing or not valid. Build the index again.")
    return manifest


def _wrong_part(manifest: Mapping[str, Any]) -> str | None:
    """The first key of a list of files that is not as it must be."""
    model, shards = manifest.get("model"), manifest.get("shards")
    if not isinstance(manifest.get("generation"), int):
        return "generation"
    if manifest.get("dtype") not in list(_DTYPES):
        return "dtype"
    if (
        not isinstance(model, dict)
        or not all(isinstance(model.get(key), str) for key in ("name", "fingerprint"))
        or not isinstance(model.get("config"), dict)
    ):
        return "model"
    if not isinstance(shards, list) or not shards:
        return "shards"
    for entry in shards:
        if not isinstance(entry, dict) or not isinstance(entry.get("count"), int):
            return "shards"
        if not _are_file_facts(entry.get("files"), _shard_files(entry.get("name"))):
            return "shards"
    _shard_files(manifest.get("matcher"))
    if manifest.get("removed") is not None:
        _shard_files(manifest["removed"])
    if not _are_file_facts(manifest.get("files", {}), ()):
        return "files"
    return None


def _are_file_facts(files: Any, names: Sequence[str]) -> bool:
    """Whether `files` gives sizes and checksums, those of `names` at least, and names no file elsewhere."""
    if not isinstance(files, dict) or not set(names) <= files.keys():
        return False
    return all(
        _PART.fullmatch(name) and isinstance(facts, dict) and isinstance(facts.get("bytes"), int)
        for name, facts in files.items()
    )


def _identity(manifest: Mapping[str, Any]) -> tuple[int, list[str]]:
    """What tells the states of an index apart; the names of shards are random."""
    return manifest["generation"], [entry["name"] for entry in manifest["shards"]]


def _reopened(kind: type[EntityIndex], directory: Path, read_only: bool) -> EntityIndex:
    index = kind.from_pretrained(directory)
    index._read_only = read_only
    return index


def _publish(directory: Path, manifest: dict[str, Any], store: _Store, matcher: Matcher | None = None) -> None:
    """Makes a list of files the index: what it lacks is written, it is replaced in one step, and what it no longer
    names is deleted after that."""
    if matcher is not None:
        manifest["matcher"] = _write_matcher(directory, matcher)
    manifest["removed"] = (
        _write_removed(directory, manifest["generation"], store.removed) if store.removed_count else None
    )
    own = [_shard_files(name)[0] for name in (manifest["matcher"], manifest["removed"]) if name]
    manifest["files"] = {file: _file_facts(directory / file) for file in own}
    _write_card(directory, manifest, store)
    _write_json(directory / _MANIFEST, manifest)
    _remove_strays(directory, manifest)


def _files_of(manifest: Mapping[str, Any]) -> list[str]:
    """The files that an index consists of."""
    files = [_MANIFEST, _shard_files(manifest["matcher"])[0]]
    for entry in manifest["shards"]:
        files += _shard_files(entry["name"])
    if manifest["removed"]:
        files.append(_shard_files(manifest["removed"])[0])
    return files


def _remove_strays(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Deletes parts that no list names: of older generations, and of changes that were interrupted."""
    named = set(_files_of(manifest))
    with suppress(EntityIndexError):
        if unfinished := _unfinished(directory):
            # A build that is to replace this index goes on later.
            named |= {file for entry in unfinished["shards"] for file in _shard_files(entry["name"])}
        else:
            (directory / _BUILD_STATE).unlink(missing_ok=True)
    for path in directory.iterdir():
        if (_is_part(path.name) and path.name not in named) or _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _is_part(name: str) -> bool:
    return _PART.fullmatch(name) is not None


def _downloaded(repo_id: str, repo_type: str, subfolder: str, revision: str | None, **options: Any) -> Path:
    """The folder of the Hub's cache with the files of an index, all of one commit."""
    options |= {"repo_id": repo_id, "repo_type": repo_type}
    folder = subfolder.strip("/")
    place = f"the folder {folder} of {repo_id}" if folder else repo_id
    try:
        # The commit of the list of files is the one that they are taken from, even if the branch moves meanwhile.
        listed = Path(hf_hub_download(filename=_MANIFEST, subfolder=folder or None, revision=revision, **options))
    except HFValidationError as error:
        raise EntityIndexError(
            f"There is no directory {repo_id!r}, and it is not the id of a Hub repository (user/name) either."
        ) from error
    except (GatedRepoError, LocalEntryNotFoundError):
        raise  # these say what to do
    except RepositoryNotFoundError as error:
        raise EntityIndexError(
            f"There is no directory {repo_id!r}, and the Hub shows no {repo_type} repository of that name. "
            f"{_hint(repo_id, repo_type, options.get('token'))}"
        ) from error
    except EntryNotFoundError as error:
        raise EntityIndexError(
            f"{place} on the Hub is no entity index: it has no {_MANIFEST}. EntityIndex.push_to_hub uploads one."
        ) from error
    root = listed.parents[len(Path(folder).parts)]
    prefix = f"{folder}/" if folder else ""
    patterns = [f"{prefix}{name}" for name in _files_of(_read_manifest(listed.parent))]
    snapshot_download(revision=root.name, allow_patterns=patterns, **options)
    return listed.parent


def _hint(repo_id: str, repo_type: str, token: str | bool | None) -> str:
    """What may be meant by the id of a repository that is not there."""
    other = "model" if repo_type == "dataset" else "dataset"
    try:
        HfApi(token=token).repo_info(repo_id, repo_type=other)
    except (HTTPError, OSError):
        return "If it is private, log in with `hf auth login` or pass `token`, for a pipeline in `index_kwargs`."
    if repo_type == "model":
        return 'There is a data set of that name: leave `repo_type="model"` out.'
    return (
        "There is a model of that name, but an index is a repository of its own: EntityIndex.build makes one of a "
        "knowledge base, push_to_hub uploads it."
    )


def _next_generation(directory: Path) -> int:
    try:
        return _read_manifest(directory)["generation"] + 1
    except EntityIndexError:
        return 1


def _write_removed(directory: Path, generation: int, removed: Tensor) -> str:
    name = f"removed-{generation:05d}"
    rows = removed.nonzero().squeeze(1)
    _write_atomically(directory / _shard_files(name)[0], lambda path: save_file({"rows": rows}, path))
    return name


def _read_removed(directory: Path, name: str | None, count: int) -> Tensor | None:
    if name is None:
        return None
    path = directory / _shard_files(name)[0]
    try:
        rows = load_file(path)["rows"]
        if rows.dtype != torch.int64 or rows.dim() != 1 or (len(rows) and not 0 <= rows.min() <= rows.max() < count):
            raise ValueError("it does not hold rows of this index")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise EntityIndexError(
            f"The index file {path} is missing or damaged: {error}. Restore it, or build the index again."
        ) from error
    removed = torch.zeros(count, dtype=torch.bool)
    removed[rows] = True
    return removed


def _copy_of(matcher: Matcher, config: Any) -> Matcher:
    copy = Matcher(config)
    copy.load_state_dict({name: tensor.detach().float().cpu() for name, tensor in matcher.state_dict().items()})
    return copy


def _write_matcher(directory: Path, matcher: Matcher) -> str:
    weights = {name: t.detach().float().cpu().contiguous() for name, t in matcher.state_dict().items()}
    name = f"matcher-{secrets.token_hex(6)}"
    _write_atomically(directory / _shard_files(name)[0], lambda path: save_file(weights, path))
    return name


def _read_matcher(directory: Path, manifest: Mapping[str, Any]) -> Matcher:
    path = directory / _shard_files(manifest["matcher"])[0]
    try:
        # Without memory for its weights until they are read: a list of files may claim any size.
        with torch.device("meta"):
            matcher = Matcher(MimicConfig.from_dict(manifest["model"]["config"]))
        weights = {name: tensor.float() for name, tensor in load_file(path).items()}
        matcher.load_state_dict(weights, assign=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise EntityIndexError(
            f"The index file {path} is missing or damaged: {error}. Restore it, or build the index again."
        ) from error
    return matcher


def _card_of(place: str, manifest: Mapping[str, Any], store: _Store, **about: str | None) -> str:
    """The text of an index's README.md; `about` as of `_index_card`."""
    facts = _TableFacts()
    for entry, shard in zip(manifest["shards"], store.shards, strict=True):
        facts += _TableFacts.stored(entry.get("facts")) or _TableFacts.of(shard.table)
    return _index_card(place, manifest, len(store) - store.removed_count, facts, store.records(), **about)


def _write_card(directory: Path, manifest: Mapping[str, Any], store: _Store) -> None:
    text = _card_of(directory.resolve().name, manifest, store, model_id=_hub_id(manifest["model"]["name"]))
    _write_atomically(directory / "README.md", lambda path: _write_text(path, text))


def _hub_id(name: str) -> str | None:
    """The name, if it is a Hub id with a namespace."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if "/" in name else None


__all__ = ["EntityIndex", "EntityIndexError", "RankResult", "SearchResult", "UnknownEntityError"]
