"""A knowledge base, encoded once: built, stored, changed, searched and shared.

This is the face of several rooms. It resolves ids to rows, hands over to the room that does the work, and turns rows
back into ids; it does no arithmetic and names no files.
"""

from __future__ import annotations

import dataclasses
import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi
from tqdm.auto import tqdm

from .building_mimic import Builder, build_in_directory, build_in_memory, shards_of_features
from .contents_mimic import Contents
from .directory_mimic import new_manifest, open_directory, save_copy, shortlist_path, verify_files
from .errors_mimic import EntityIndexError, MimicError
from .files_mimic import is_there, no_space_told
from .identity_mimic import check_made_by, copy_of_matcher, model_facts
from .index_hub_mimic import download_index, files_for_hub, upload_index
from .matching_mimic import EntityFeatures, Matcher, MentionFeatures, PairScores
from .mentions_mimic import answer_of_error, checked_mentions, encoded_mentions, place_in_input
from .modeling_mimic import MimicModel
from .pairs_mimic import SearchStats
from .parts_mimic import build_part, checked_part, merge_parts
from .processing_mimic import MimicProcessor
from .search_mimic import (
    METHODS,
    FoundEntities,
    answer_ranks,
    answer_scores,
    best_entities,
    better_entities,
)
from .shortlist_mimic import Shortlist
from .store_mimic import Store


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


class EntityIndex:
    """A knowledge base encoded by a [`MimicModel`], to be searched for the entities that mentions mean.

    An index lives in memory, or in a directory that is memory-mapped: opening it reads next to nothing. It keeps what
    scoring needs of the model, so that the features of mentions are all that a search takes; [`check_model`] tells
    whether a model is the one that made the index.

    Example:

    ```python
    >>> index = EntityIndex.build(model, processor, knowledge_base, "my-index")
    >>> index.link(model, processor, [{"mention": "Orange", "text": "Orange opened a shop."}], top_k=1)
    [[{'entity_id': 'brand:orange', 'name': 'Orange', 'description': 'A company.', 'score': 7.1, ...}]]
    ```

    `in` and iteration speak of ids; [`entities`] gives the records. Made by [`EntityIndex.build`],
    [`EntityIndex.from_features`] and [`EntityIndex.from_pretrained`].
    """

    def __init__(self, matcher: Matcher, contents: Contents) -> None:
        self._matcher = matcher.eval().requires_grad_(False)
        self._contents = contents
        self._shortlist: tuple[Contents, Shortlist] | None = None

    def __reduce__(self) -> Any:
        # A worker process opens a stored index itself; memory-mapped files cannot be sent to it.
        if self._contents.directory is None:
            return type(self), (self._matcher, self._contents)
        return _reopened, (type(self), self._contents.directory, self._contents.read_only)

    # --- What it holds

    def __len__(self) -> int:
        """The number of entities."""
        return len(self._contents)

    def __contains__(self, entity_id: object) -> bool:
        """Whether there is an entity of that id."""
        return self._contents.row(entity_id) is not None

    def __iter__(self) -> Iterator[str]:
        """The ids of the entities."""
        return (record["id"] for record in self.entities())

    def entities(self) -> Iterator[dict[str, Any]]:
        """The entities' own data, as [`entity`] gives it."""
        return self._contents.store.records()

    def __repr__(self) -> str:
        place = "in memory" if self.directory is None else str(self.directory)
        return f"EntityIndex({len(self):,} entities, {self.dtype}, {self.bytes_per_entity:,.0f} bytes each, {place})"

    @property
    def dtype(self) -> str:
        """What the features are stored in: "float32", "float16" or "int8"."""
        return self._contents.manifest["dtype"]

    @property
    def bytes_per_entity(self) -> float:
        """Bytes of features for each stored entity, its own data not counted."""
        store = self._contents.store
        return store.feature_bytes / max(1, len(store))

    @property
    def made_by(self) -> Mapping[str, Any]:
        """What is noted of the model and processor that made the index."""
        return self._contents.manifest["model"]

    @property
    def directory(self) -> Path | None:
        """Where the index is stored; `None` if it is in memory."""
        return self._contents.directory

    def entity(self, entity_id: str) -> dict[str, Any]:
        """The data of an entity: `id`, `name`, `description` and the other plain fields that it was built with.

        Raises:
            UnknownEntityError: if there is no such entity.
        """
        contents = self._contents
        return contents.store.record(contents.rows([entity_id])[0])

    def features(self, entity_ids: Sequence[str]) -> EntityFeatures:
        """The features of some entities, float32, as they are stored: those of an int8 index are rounded.

        Raises:
            UnknownEntityError: if some are not in the index.
        """
        contents = self._contents
        rows = torch.tensor(contents.rows(entity_ids), dtype=torch.long)
        return contents.store.full(rows, torch.device("cpu")).to(torch.float32)

    # --- Names

    def find(self, name: str, *, max_distance: int = 2) -> list[str]:
        """The ids of the entities that bear a name or alias, in the index's order: as it is written; where there are
        none but for case and the form of its Unicode; and where there are none either, those whose names are nearest.

        Args:
            name: the name.
            max_distance: how many characters may differ in the last case, which needs `rapidfuzz`; a third of the
                name's at most. 0 leaves that case out.

        Raises:
            EntityIndexError: if the index was made without names: see [`build_names`].
        """
        contents = self._contents
        rows = contents.rows_named(name, min(max_distance, len(name) // 3))
        return [contents.store.record(row)["id"] for row in rows]

    def find_mentions(self, text: str, *, lower_case: bool = False) -> list[tuple[int, int]]:
        """Where names and aliases of the entities occur in a text: start and end of each place, in characters.

        Names are whole words, in any script; case and the form of the Unicode do not matter. Where several overlap
        the longest is taken. What is too common is not: one character, what has no letter, stop words, and a single
        word in lower case for a name that is not written so.

        Args:
            text: any text.
            lower_case: whether such words in lower case are taken too.

        Raises:
            EntityIndexError: if the index was made without names: see [`build_names`].
        """
        return self._contents.spans_of_names(text, lower_case)

    def build_names(self) -> None:
        """Makes the table of names of an index that was made without; a stored index keeps it.

        Raises:
            EntityIndexError: if another process is changing the index.
        """
        self._contents = self._contents.with_names()

    def check_model(self, model: MimicModel, processor: MimicProcessor | None = None) -> None:
        """Makes sure that a model is the one whose features this index holds, and a processor, where it is given, the
        one that its entities were read with.

        Raises:
            EntityIndexError: if it is another. Says in what it differs.
        """
        check_made_by(self._contents.manifest["model"], model, processor)

    # --- Search

    def link(
        self,
        model: MimicModel,
        processor: MimicProcessor,
        mentions: Iterable[Mapping[str, Any]],
        top_k: int = 5,
        *,
        batch_size: int = 32,
        candidates: Sequence[Sequence[str] | str | None] | str | None = None,
        method: str = "pruned",
        on_image_error: str = "raise",
        on_error: str = "raise",
        context_window: str | None = None,
        show_progress: bool = False,
    ) -> list[Any]:
        """Finds the entities that fit each mention best, from the mentions as they are.

        Args:
            model, processor: what made the index, and encodes the mentions; on the model's device.
            mentions: M dicts with `mention`, `text` and, where there is one, `image`; `start` and `end`, the mention's
                place in its text, are of use for the context window "mention".
            top_k: number of entities for each mention.
            batch_size: mentions encoded at a time.
            candidates: for each mention, or for all of them, what it may mean. A list of ids; "names" for the entities
                that bear the mention's words as their name or alias, and all where there are none; "names+search" for
                these and what the search finds among all, `top_k` of each at most; or `None` for all.
            method: as in [`search`].
            on_image_error: "raise", or "warn" to go on without an image that cannot be read.
            on_error: what follows from a mention that cannot be linked. "raise" ends the call with an error that
                names its row and id; "warn" gives an empty list in its place; "return" a dict with `error`, the
                message, and `error_type`.
            context_window: "start" or "mention", in place of the configuration's: see [`MimicConfig`].
            show_progress: whether to show a progress bar.

        Returns:
            for each mention its entities, best first: dicts with `entity_id`, `name`, `description`, `score`,
            `text_score`, `image_score` and `cross_modal_score`.

        Raises:
            MentionError: if a mention is not as described.
            ValueError: if an argument is not valid.
            MimicImageError: if an image cannot be read.
            EntityIndexError: if the index is of another model.
        """
        self.check_model(model, processor)
        encoded = encoded_mentions(
            model, processor, mentions, batch_size, on_image_error, show_progress, on_error, context_window
        )
        count = len(encoded.rows) + len(encoded.failed)
        given = [candidates] * count if candidates is None or isinstance(candidates, str) else list(candidates)
        if len(given) != count:
            raise ValueError(f"There are {count} mentions, but candidates for {len(given)}.")
        answers: list[Any] = [encoded.failed.get(row) for row in range(count)]
        kept = []
        for place, row in enumerate(encoded.rows):
            try:
                if not isinstance(given[row], str):
                    self._contents.candidate_rows(given[row])
                kept.append(place)
            except (MimicError, ValueError) as error:
                answers[row] = answer_of_error(error, place_in_input(row, None), on_error)
        if kept and encoded.features is not None:
            found = self.link_encoded(
                encoded.features[torch.tensor(kept)],
                top_k,
                candidates=[given[encoded.rows[place]] for place in kept],
                names=[encoded.mentions[place].mention for place in kept],
                method=method,
                show_progress=show_progress,
            )
            for place, entities in zip(kept, found, strict=True):
                answers[encoded.rows[place]] = entities
        return answers

    def link_encoded(
        self,
        mentions: MentionFeatures,
        top_k: int = 5,
        *,
        candidates: Sequence[Sequence[str] | str | None] | str | None = None,
        names: Sequence[str] | None = None,
        **options: Any,
    ) -> list[list[dict[str, Any]]]:
        """As [`link`], of mentions that were encoded before.

        Args:
            mentions, top_k, **options: as of [`search`].
            candidates: as of [`link`].
            names: what each mention says, for candidates that are found by name.
        """
        contents = self._contents
        given = [candidates] * len(mentions) if candidates is None or isinstance(candidates, str) else list(candidates)
        allowed, added = contents.candidates_by_name(given, names)
        linked = self._linked(contents, mentions, top_k, allowed, **options)
        rows = [row for row, bearers in enumerate(added) if bearers is not None]
        if rows:
            named = self._linked(contents, mentions[torch.tensor(rows)], top_k, [added[row] for row in rows], **options)
            for row, entities in zip(rows, named, strict=True):
                both = {found["entity_id"]: found for found in [*entities, *linked[row]]}
                linked[row] = sorted(both.values(), key=lambda found: -found["score"])
        return linked

    def _linked(
        self, contents: Contents, mentions: MentionFeatures, top_k: int, candidates: Sequence[Any], **options: Any
    ) -> list[list[dict[str, Any]]]:
        found = self._search(contents, mentions, top_k, candidates=candidates, **options)
        names = ("score", "text_score", "image_score", "cross_modal_score")
        linked = []
        for rows, *scores in zip(found.rows.tolist(), *_arrays(found.scores), strict=True):
            answers = []
            for row, *values in zip(rows, *scores, strict=True):
                if row >= 0:
                    record = contents.store.record(row)
                    answer = {"entity_id": record["id"], "name": record["name"], "description": record["description"]}
                    answers.append(answer | dict(zip(names, map(float, values), strict=True)))
            linked.append(answers)
        return linked

    def search(
        self,
        mentions: MentionFeatures,
        top_k: int = 10,
        *,
        candidates: Sequence[Sequence[str] | None] | None = None,
        method: str = "pruned",
        min_score: float | Sequence[float] | np.ndarray | None = None,
        num_candidates: int | None = None,
        nprobe: int = 32,
        show_progress: bool = False,
    ) -> SearchResult:
        """Finds the entities that fit each mention best; exactly, unless a shortlist is asked for.

        Args:
            mentions ([`MentionFeatures`]): M mentions, from [`MimicModel.encode_mentions`]. The work is done on their
                device.
            top_k: number of entities wanted; all, if the knowledge base has fewer.
            candidates: for each mention the ids of the entities that it may mean, or `None` for all.
            method: "pruned" scores only those pairs whose upper bound leaves them in question, "exhaustive" scores
                all. Both are exact, and their answers are the same.
            min_score: what an entity's score must reach to be found, for all mentions or for each: those below are
                left out, and are pruned where their upper bound is below.
            num_candidates: number of entities that an approximate shortlist leaves of each mention's, to be scored
                exactly; needs `faiss`, and is for knowledge bases of 10^7 entities and more. See [`build_shortlist`].
            nprobe: of the shortlist, the number of an inverted file's lists that are read.
            show_progress: whether to show a progress bar.

        Raises:
            ValueError: if `top_k`, `method` or `num_candidates` is not valid, or the numbers of mentions and candidates
                differ.
            UnknownEntityError: if a candidate is not in the index.
            EntityIndexError: if the index is empty, or has no shortlist.
        """
        contents = self._contents
        found = self._search(
            contents,
            mentions,
            top_k,
            candidates=candidates,
            method=method,
            min_score=min_score,
            num_candidates=num_candidates,
            nprobe=nprobe,
            show_progress=show_progress,
        )
        ids = [[contents.store.record(row)["id"] for row in rows if row >= 0] for rows in found.rows.tolist()]
        total, text, image, cross_modal = _arrays(found.scores)
        return SearchResult(ids, total, text, image, cross_modal, found.stats)

    def _search(
        self,
        contents: Contents,
        mentions: MentionFeatures,
        top_k: int,
        *,
        candidates: Sequence[Sequence[str] | None] | None = None,
        method: str = "pruned",
        min_score: float | Sequence[float] | np.ndarray | None = None,
        num_candidates: int | None = None,
        nprobe: int = 32,
        show_progress: bool = False,
    ) -> FoundEntities:
        top_k = _at_least("top_k", top_k, 1)
        matcher, mentions = self._checked(contents, mentions, method)
        if candidates is not None and len(candidates) != len(mentions):
            raise ValueError(f"There are {len(mentions)} mentions, but candidates for {len(candidates)}.")
        allowed = [contents.candidate_rows(ids) for ids in candidates or [None] * len(mentions)]
        if num_candidates is not None:
            num_candidates = _at_least("num_candidates", num_candidates, top_k)
            shortlist = self._loaded_shortlist(contents)
            allowed = shortlist.instead_of_all(contents.store, mentions, allowed, num_candidates, nprobe)
        total = sum(len(contents.store) if rows is None else len(rows) for rows in allowed)
        k = min(top_k, len(contents))
        with _progress("Searching", total, show_progress) as advance:
            return best_entities(
                matcher,
                contents.store,
                mentions,
                k,
                method=method,
                candidates=allowed,
                advance=advance,
                floor=_for_each("min_score", min_score, mentions),
            )

    def rank(
        self,
        mentions: MentionFeatures,
        answers: Sequence[str | None],
        *,
        method: str = "pruned",
        show_progress: bool = False,
    ) -> RankResult:
        """The rank of each mention's answer among all entities, without a matrix of scores.

        Args:
            mentions ([`MentionFeatures`]): M mentions.
            answers: the id of each mention's entity. Where it is not in the index the rank is NaN.
            method, show_progress: as in [`search`].

        Raises:
            ValueError: if the numbers of mentions and answers differ, or `method` is not valid.
            EntityIndexError: if the index is empty.
        """
        contents = self._contents
        matcher, mentions = self._checked(contents, mentions, method)
        rows = self._answer_rows(contents, mentions, answers)
        known = (rows >= 0).nonzero().squeeze(1)
        with _progress("Ranking", len(known) * len(contents.store), show_progress) as advance:
            ranked, stats = answer_ranks(
                matcher, contents.store, mentions[known], rows[known], method=method, advance=advance
            )
        ranks = np.full(len(answers), np.nan)
        ranks[known.cpu().numpy()] = ranked.cpu().numpy()
        return RankResult(ranks, stats)

    def answer_scores(self, mentions: MentionFeatures, answers: Sequence[str | None]) -> np.ndarray:
        """The score of each mention's answer, float32 of shape `(M,)`; NaN where it is not in the index.

        With [`count_better`] it gives ranks in a knowledge base of which this index is a part.

        Args:
            mentions, answers: as in [`rank`].
        """
        contents = self._contents
        matcher, mentions = self._checked(contents, mentions, METHODS[0])
        rows = self._answer_rows(contents, mentions, answers)
        known = (rows >= 0).nonzero().squeeze(1)
        scores = np.full(len(answers), np.nan, dtype=np.float32)
        scores[known.cpu().numpy()] = answer_scores(matcher, contents.store, mentions[known], rows[known]).cpu().numpy()
        return scores

    def count_better(
        self,
        mentions: MentionFeatures,
        scores: Sequence[float] | np.ndarray,
        answers: Sequence[str | None],
        *,
        method: str = "pruned",
        show_progress: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """How many entities are better than each mention's answer, and how many as good: int64 of shape `(M,)` each.

        Summed over the parts of a knowledge base, `1 + better + equal / 2` is the rank that [`rank`] gives.

        Args:
            mentions ([`MentionFeatures`]): M mentions.
            scores: of their answers, from [`answer_scores`] of the part that has each.
            answers: their ids; one that is in this index does not count itself.
            method, show_progress: as in [`search`].

        Raises:
            ValueError: if the numbers differ, or `method` is not valid.
            EntityIndexError: if the index is empty.
        """
        contents = self._contents
        matcher, mentions = self._checked(contents, mentions, method)
        rows = self._answer_rows(contents, mentions, answers)
        gold = _for_each("scores", scores, mentions)
        assert gold is not None
        with _progress("Ranking", len(rows) * len(contents.store), show_progress) as advance:
            above, equal = better_entities(
                matcher, contents.store, mentions, rows, gold, method=method, advance=advance
            )
        return above.cpu().numpy(), equal.cpu().numpy()

    @staticmethod
    def _answer_rows(contents: Contents, mentions: MentionFeatures, answers: Sequence[str | None]) -> torch.Tensor:
        """The row of each mention's answer, -1 where it is not there."""
        if len(answers) != len(mentions):
            raise ValueError(f"There are {len(mentions)} mentions, but answers for {len(answers)}.")
        found = [contents.row(answer) for answer in answers]
        return torch.tensor([-1 if row is None else row for row in found], dtype=torch.long, device=mentions.device)

    def _checked(self, contents: Contents, mentions: MentionFeatures, method: str) -> tuple[Matcher, MentionFeatures]:
        """The matcher on the mentions' device, and the mentions, if they can be searched with."""
        if method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}.")
        if not len(contents):
            raise EntityIndexError("This index has no entities, so there is nothing to search.")
        mentions = checked_mentions(mentions, self._matcher)
        return self._matcher.to(mentions.device), mentions

    def build_shortlist(self, factory: str | None = None, *, show_progress: bool = True) -> None:
        """Makes the approximate shortlist of [`search`], and stores it beside the index.

        It is not part of the index: after a change of the index it has to be made again, and it is not uploaded.

        Args:
            factory: faiss's description of the index, such as "IVF4096,SQ8" or "HNSW32". By default an inverted file
                with 8-bit vectors, or, below 50,000 entities, a plain scan.

        Raises:
            ImportError: if faiss is not installed.
            ValueError: if faiss does not know the description.
        """
        contents = self._contents
        shortlist = Shortlist.build(contents.store, factory, show_progress)
        self._shortlist = (contents, shortlist)
        if contents.directory is not None and not contents.read_only:
            with no_space_told(contents.directory):
                shortlist.save(shortlist_path(contents.directory, contents.manifest))

    def _loaded_shortlist(self, contents: Contents) -> Shortlist:
        if self._shortlist is None or self._shortlist[0] is not contents:
            path = contents.directory and shortlist_path(contents.directory, contents.manifest)
            if path is None or not path.is_file():
                raise EntityIndexError(
                    "This index has no shortlist of its entities as they are now; call build_shortlist() first."
                )
            self._shortlist = (contents, Shortlist.load(path))
        return self._shortlist[1]

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
        num_workers: int | None = None,
        on_image_error: str = "warn",
        overwrite: bool = False,
        shard_entities: int | None = None,
        shard: tuple[int, int] | None = None,
        show_progress: bool = True,
        allow_urls: bool | str | None = None,
        image_root: bool | str | os.PathLike[str] | None = None,
        encoding_dtype: str | None = None,
    ) -> EntityIndex:
        """Encodes a knowledge base.

        With an `output_dir` memory stays bounded whatever the number of entities, and a build that was interrupted
        goes on where it stopped when the same call is made again.

        Args:
            model, processor: what encodes; the work is done on the model's device.
            entities: a `datasets.Dataset`, a `pandas.DataFrame`, a list or any iterable of dicts with `id`, `name`,
                `description` and `images` (a list of images, of which the first is used; a single image; or nothing).
                Other plain fields are kept with the entity.
            output_dir: where the index is stored; in memory if absent.
            dtype: "float32", "float16" or "int8".
            batch_size: entities encoded at a time.
            num_workers: processes that read and resize images beside the one that encodes. Unless told, none for
                fewer than 2,048 entities, else as many as half of the cores, 4 at most.
            on_image_error: "warn" goes on without an image that cannot be read, "raise" stops.
            overwrite: whether an index that is in `output_dir` is replaced, once the new one is complete; and
                whether an unfinished build of something else is given up.
            shard_entities: entities in a file, and those that an interruption may cost. Unless told 8,192, and more
                where an index has hundreds of files, up to 65,536.
            shard: `(i, n)` encodes the i-th (from 0) of n parts of the entities only, in a folder of `output_dir`. Each
                part goes on by itself after an interruption; the call that completes the last one joins them to the
                index in `output_dir` and gives that, all others give their part. Where machines do not share
                `output_dir`, join the parts with [`merge`].
            show_progress: whether to show a progress bar.
            allow_urls: whether images that are named by an address are fetched: `True` (public addresses),
                `"private"` (those of this machine and of private networks too) or `False`.
            image_root: whether images that are named by a path are read from this machine: `True` (any), `False`, or
                the folder that they must be in. Both default to what a list or DataFrame that the caller made needs,
                which is everything, and to nothing for a data set, whose rows bring their images along.
            encoding_dtype: what the encoder computes in: "auto" for bfloat16 where the CPU or the GPU computes it,
                which is faster, "bfloat16", "float32", or "float16" on a GPU. Unless told, what the model's weights
                are in. The units compute in float32, and what is stored is of `dtype`.

        Raises:
            EntityIndexError: if there are no entities, `output_dir` already holds an index, an unfinished build of
                other entities or of another model is there, or the model gives an entity numbers that are not finite.
            ValueError: if an entity has no id, or two have the same.
        """
        builder = Builder(
            model,
            processor,
            dtype,
            batch_size,
            num_workers,
            on_image_error,
            shard_entities,
            show_progress,
            allow_urls,
            image_root,
            encoding_dtype,
        )
        if shard is not None:
            index, parts = checked_part(shard)
            if output_dir is None:
                raise ValueError("`shard` needs an `output_dir`, where the parts are joined.")
            return cls.from_pretrained(build_part(builder, entities, Path(output_dir), index, parts, overwrite))
        if output_dir is None:
            return cls(copy_of_matcher(model), Contents(*build_in_memory(builder, entities)))
        build_in_directory(builder, entities, Path(output_dir), overwrite)
        return cls.from_pretrained(output_dir)

    @classmethod
    def from_features(
        cls,
        features: EntityFeatures,
        records: Any,
        model: MimicModel,
        *,
        dtype: str = "float16",
        shard_entities: int | None = None,
    ) -> EntityIndex:
        """An index, in memory, of entities that were encoded before; [`save_pretrained`] stores it.

        Args:
            features ([`EntityFeatures`]): N entities, from [`MimicModel.encode_entities`].
            records: N records in the same order, as `entities` of [`build`]; their images are not read.
            model: what made the features.
            dtype, shard_entities: as in [`build`].

        Raises:
            ValueError: if the numbers differ, an entity has no id, or two have the same.
        """
        shards = shards_of_features(features, records, model, dtype, shard_entities)
        return cls(copy_of_matcher(model), Contents(new_manifest(dtype, model_facts(model)), Store(shards)))

    @classmethod
    def merge(
        cls,
        parts: Iterable[str | os.PathLike[str]],
        output_dir: str | os.PathLike[str],
        *,
        move: bool = False,
        overwrite: bool = False,
    ) -> EntityIndex:
        """Joins stored indexes of one model to one, without encoding anything again.

        Files are linked where the file system can, else copied. The order is that of the parts.

        Args:
            parts: directories of indexes.
            output_dir: where the joined index is stored.
            move: whether the parts are deleted once the index is complete.
            overwrite: whether an index that is in `output_dir` is replaced.

        Raises:
            EntityIndexError: if a part is missing, damaged or unfinished, parts differ in model or precision, two have
                an entity of the same id, or `output_dir` holds an index already.
        """
        if isinstance(parts, str | os.PathLike):
            raise ValueError(f"`parts` must be a list of directories, got {str(parts)!r}.")
        merge_parts([Path(part) for part in parts], Path(output_dir), move=move, overwrite=overwrite)
        return cls.from_pretrained(output_dir)

    # --- Change

    def add(self, model: MimicModel, processor: MimicProcessor, entities: Any, **options: Any) -> None:
        """Adds entities; what is there is not encoded again. All are added, or none.

        Args:
            model, processor, entities: as in [`build`]; the ids must be new.
            **options: `batch_size`, `num_workers`, `on_image_error`, `show_progress`, `encoding_dtype`, `allow_urls`
                and `image_root` of [`build`].

        Raises:
            ValueError: if an id is already there, or twice among the new ones.
            EntityIndexError: if the model is not the index's, or another process is changing the index.
        """
        self.check_model(model, processor)
        builder = Builder(model, processor, self.dtype, **options)
        self._contents = self._contents.with_entities(builder, entities, replace=False)

    def update(self, model: MimicModel, processor: MimicProcessor, entities: Any, **options: Any) -> None:
        """Replaces entities that are there by new versions of them. Arguments as of [`add`].

        Raises:
            UnknownEntityError: if an id is not there.
            ValueError, EntityIndexError: as in [`add`].
        """
        self.check_model(model, processor)
        builder = Builder(model, processor, self.dtype, **options)
        self._contents = self._contents.with_entities(builder, entities, replace=True)

    def remove(self, entity_ids: Iterable[str]) -> None:
        """Removes entities: no search finds them any more. [`compact`] frees their space.

        Raises:
            UnknownEntityError: if an id is not there; then none is removed.
            EntityIndexError: if another process is changing the index.
        """
        self._contents = self._contents.without(entity_ids)

    def compact(self) -> None:
        """Frees the space of removed entities, and joins small files.

        Raises:
            EntityIndexError: if no entity is left, or another process is changing the index.
        """
        self._contents = self._contents.compacted()

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
        contents = self._contents
        if contents.directory is None or directory.resolve() != contents.directory.resolve():
            save_copy(directory, contents.manifest, contents.store, self._matcher)
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
        repo_id = HfApi(token=token).create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
        with self.files_for_hub(repo_id, model_id=model_id, license=license, source=source) as files:
            return upload_index(files, repo_id, token=token, revision=revision, commit_message=commit_message)

    def files_for_hub(self, repo_id: str, **about: str | None) -> AbstractContextManager[dict[str, Path | bytes]]:
        """A context with the content of each file of a repository of this index, as [`push_to_hub`] sends it.

        Args:
            repo_id: the repository's id.
            **about: `model_id`, `license` and `source`, as of [`push_to_hub`].
        """
        if not len(self):
            raise EntityIndexError("All entities of this index were removed: there is nothing to publish.")
        contents = self._contents
        return files_for_hub(
            repo_id,
            contents.directory,
            contents.manifest,
            contents.store,
            self._matcher,
            from_cache=contents.read_only,
            **about,
        )

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
        if is_there(name_or_path):
            return cls._opened(Path(name_or_path) / subfolder, read_only=False)
        return cls.from_hub(
            str(name_or_path),
            subfolder=subfolder,
            repo_type=repo_type,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
        )

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        *,
        subfolder: str = "",
        repo_type: str = "dataset",
        revision: str | None = None,
        **options: Any,
    ) -> EntityIndex:
        """Opens an index of the Hub, whatever directories of that name this machine has. Arguments, and what is
        raised, as of [`from_pretrained`]."""
        return cls._opened(download_index(repo_id, repo_type, subfolder, revision, **options), read_only=True)

    @classmethod
    def _opened(cls, directory: Path, read_only: bool) -> EntityIndex:
        manifest, store, matcher = open_directory(directory)
        return cls(matcher, Contents(manifest, store, directory, read_only))

    def verify(self) -> None:
        """Reads all of an index: of a stored one every file is compared with the checksum that was taken when it was
        written; of any, every number must be finite, and every entity found by an id of its own.

        Raises:
            EntityIndexError: if something is wrong. Says what, and which entity's.
        """
        contents = self._contents
        if contents.directory is not None:
            verify_files(contents.directory, contents.manifest)
        contents.store.check()


def _at_least(name: str, value: Any, least: int) -> int:
    """An integer argument."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        what = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ValueError(f"`{name}` must be {what}, got {value!r}.")
    return operator.index(value)


def _for_each(name: str, values: Any, mentions: MentionFeatures) -> torch.Tensor | None:
    """A number for each mention, float32 of shape (M,), from one for all or from one for each."""
    if values is None:
        return None
    array = np.asarray(values, dtype=np.float32)
    if array.shape not in ((), (len(mentions),)) or np.isnan(array).any():
        raise ValueError(
            f"`{name}` must be a number, or one for each of {len(mentions)} mentions, and none may be NaN; got "
            f"{'NaN' if np.isnan(array).any() else f'the shape {array.shape}'}."
        )
    return torch.from_numpy(np.broadcast_to(array, (len(mentions),)).copy()).to(mentions.device)


def _arrays(scores: PairScores) -> tuple[np.ndarray, ...]:
    parts = (scores.total, scores.text, scores.image, scores.cross_modal)
    return tuple(part.cpu().numpy() for part in parts)


@contextmanager
def _progress(what: str, total: int, show: bool) -> Iterator[Any]:
    """A bar that counts pairs; gives the function that is told of them."""
    with tqdm(total=total, desc=what, unit="pair", unit_scale=True, disable=not show) as bar:
        yield bar.update


def _reopened(kind: type[EntityIndex], directory: Path, read_only: bool) -> EntityIndex:
    index = kind.from_pretrained(directory)
    index._contents = dataclasses.replace(index._contents, read_only=read_only)
    return index


__all__ = ["EntityIndex", "RankResult", "SearchResult"]
