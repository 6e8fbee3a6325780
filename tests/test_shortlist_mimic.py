"""The approximate first stage: what it finds, where it is kept, what is said without it."""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mimic_el import EntityIndex, EntityIndexError, MentionFeatures, MimicConfig, identity_mimic
from mimic_el.contents_mimic import Contents
from mimic_el.matching_mimic import Matcher, MimicEncoderOutput
from mimic_el.precision_mimic import quantized
from mimic_el.shortlist_mimic import shortlist_vectors
from mimic_el.store_mimic import Store, make_shard

ENTITIES, MENTIONS = 400, 6
SIZES: dict[str, Any] = {"image_hidden_size": 8, "tglu_hidden_size": 8, "vdlu_hidden_size": 8, "cmfu_hidden_size": 8}


def encoded(count: int, config: MimicConfig) -> MimicEncoderOutput:
    backbone: Any = config.backbone_config
    return MimicEncoderOutput(
        text_embeds=F.normalize(torch.randn(count, backbone.projection_dim), dim=-1),
        text_tokens=torch.randn(count, 6, backbone.text_config.hidden_size),
        image_embeds=torch.randn(count, 8),
        image_tokens=torch.randn(count, 4, 8),
    )


@pytest.fixture
def index() -> EntityIndex:
    torch.manual_seed(0)
    config = MimicConfig(**SIZES)
    matcher = Matcher(config).eval()
    with torch.inference_mode():
        features = matcher.entity_features(encoded(ENTITIES, config), torch.ones(ENTITIES, 6))
        stored = quantized(features, matcher, torch.float32)
    shard = make_shard("shard-0", stored, [{"id": f"e{row}", "name": ""} for row in range(ENTITIES)])
    # As the first version noted it: no whole model is needed for that.
    fingerprint = identity_mimic._first_fingerprint(config, matcher)
    model = {"name": "m", "fingerprint": fingerprint, "probe": [], "config": config.to_dict()}
    manifest = {"format": "mimic-entity-index", "version": 1, "generation": 1, "dtype": "float32", "model": model}
    return EntityIndex(matcher, Contents({**manifest, "removed": None}, Store([shard])))


@pytest.fixture
def mentions(index: EntityIndex) -> MentionFeatures:
    config = MimicConfig(**SIZES)
    with torch.inference_mode():
        return index.state.matcher.mention_features(encoded(MENTIONS, config), torch.ones(MENTIONS, 6))


def test_candidates_are_those_with_the_largest_dot_products(index: EntityIndex, mentions: MentionFeatures) -> None:
    index.build_shortlist("Flat", show_progress=False)
    entity = index._contents.store.full(slice(0, ENTITIES), torch.device("cpu")).tensors
    mention = mentions.tensors
    # The text's dot product is half of one of three units, the cross-modal one a whole unit.
    products = mention["text_embed"] @ entity["text_embed"].T / 6 + mention["cross_modal"] @ entity["cross_modal"].T / 3
    found = index.state.shortlist.candidates(mention, 20, nprobe=1)
    for row in range(MENTIONS):
        assert set(found[row].tolist()) == set(products[row].topk(20).indices.tolist())
    together = shortlist_vectors(mention) @ shortlist_vectors(entity).T
    np.testing.assert_allclose(together, products.numpy(), atol=1e-4)


def test_with_all_entities_as_candidates_the_answer_is_exact(index: EntityIndex, mentions: MentionFeatures) -> None:
    index.build_shortlist("IVF4,Flat", show_progress=False)
    exact = index.search(mentions, 5)
    approximate = index.search(mentions, 5, num_candidates=ENTITIES, nprobe=4)
    assert approximate.entity_ids == exact.entity_ids
    np.testing.assert_allclose(approximate.scores, exact.scores, atol=1e-5)


def test_few_candidates_score_few_pairs_and_the_best_of_them_come_first(
    index: EntityIndex, mentions: MentionFeatures
) -> None:
    index.build_shortlist(show_progress=False)
    found = index.search(mentions, 5, num_candidates=30)
    assert found.stats.exact_pairs == MENTIONS * 30
    assert found.stats.pairs == MENTIONS * 30, "the answer speaks of the candidates only"
    assert (np.diff(found.scores, axis=1) <= 0).all()


def test_removed_entities_are_never_found(index: EntityIndex, mentions: MentionFeatures) -> None:
    best = index.search(mentions, 1).entity_ids[0][0]
    index.remove([best])
    index.build_shortlist("Flat", show_progress=False)
    found = index.search(mentions, 5, num_candidates=ENTITIES)
    assert all(best not in ids for ids in found.entity_ids)


def test_it_is_stored_beside_the_index_and_belongs_to_its_generation(
    index: EntityIndex, mentions: MentionFeatures, tmp_path: Path
) -> None:
    index.save_pretrained(tmp_path)
    stored = EntityIndex.from_pretrained(tmp_path)
    with pytest.raises(EntityIndexError, match="build_shortlist"):
        stored.search(mentions, 5, num_candidates=10)
    stored.build_shortlist("Flat", show_progress=False)
    again = EntityIndex.from_pretrained(tmp_path)
    expected = stored.search(mentions, 5, num_candidates=50).entity_ids
    assert again.search(mentions, 5, num_candidates=50).entity_ids == expected
    again.remove(["e0"])
    assert not list(tmp_path.glob("first-stage-*"))
    with pytest.raises(EntityIndexError, match="build_shortlist"):
        again.search(mentions, 5, num_candidates=50)


def test_removed_entities_take_no_candidates_place(index: EntityIndex, mentions: MentionFeatures) -> None:
    index.remove([f"e{row}" for row in range(ENTITIES - 16)])
    index.build_shortlist(show_progress=False)
    found = index.search(mentions, 10, num_candidates=16)
    assert found.entity_ids == index.search(mentions, 10).entity_ids


@pytest.mark.parametrize("factory", ["IVF80,Flat", "HNSW4", "HNSW4,Flat"])
@pytest.mark.parametrize("removed", [0, ENTITIES - 16])
def test_as_many_entities_as_are_wanted(
    factory: str, removed: int, index: EntityIndex, mentions: MentionFeatures
) -> None:
    index.remove([f"e{row}" for row in range(removed)])
    index.build_shortlist(factory, show_progress=False)
    found = index.search(mentions, 16, num_candidates=16, nprobe=1)
    assert [len(set(entity_ids)) for entity_ids in found.entity_ids] == [16] * MENTIONS


def test_bad_arguments(index: EntityIndex, mentions: MentionFeatures, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="faiss cannot make the index 'IVF100000,Flat'"):
        index.build_shortlist("IVF100000,Flat", show_progress=False)
    with pytest.raises(ValueError, match="`factory` must be a description"):
        index.build_shortlist(5, show_progress=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NoSuchThing"):
        index.build_shortlist("NoSuchThing7", show_progress=False)
    with pytest.raises(ValueError, match="an integer of at least 5, got 4"):
        index.search(mentions, 5, num_candidates=4)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        index.build_shortlist(show_progress=False)


@pytest.fixture
def stored(index: EntityIndex, tmp_path: Path) -> Path:
    """An index of 400 entities with a shortlist, on disk."""
    index.save_pretrained(tmp_path)
    opened = EntityIndex.from_pretrained(tmp_path)
    opened.build_shortlist("IVF4,Flat", show_progress=False)
    return next(tmp_path.glob("first-stage-*.faiss"))


def _other_rows(path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    whole = faiss.read_index(str(path))
    few = faiss.IndexFlatIP(whole.d)
    few.add(np.zeros((3, whole.d), dtype=np.float32))
    faiss.write_index(few, str(path))


def _unknown_rows(path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    whole = faiss.read_index(str(path))
    vectors = whole.reconstruct_n(0, whole.ntotal) if whole.make_direct_map() is None else None
    other = faiss.index_factory(whole.d, "IVF4,Flat", faiss.METRIC_INNER_PRODUCT)
    other.train(vectors)
    other.add_with_ids(vectors, np.arange(whole.ntotal) + 10**6)
    faiss.write_index(other, str(path))


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, Any] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "empty": lambda path: path.write_bytes(b""),
    "another file": lambda path: path.write_text("text"),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": _pipe,
    "other rows": _other_rows,
    "rows that there are not": _unknown_rows,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_told(name: str, stored: Path, mentions: MentionFeatures):
    DAMAGE[name](stored)
    opened = EntityIndex.from_pretrained(stored.parent)
    with pytest.raises(EntityIndexError, match=r"shortlist .* is damaged: .*Call build_shortlist\(\)"):
        opened.search(mentions, 3, num_candidates=20, nprobe=4)
    with pytest.raises(EntityIndexError, match=r"shortlist .* is damaged"):
        opened.verify()


def test_verify_finds_any_byte_that_was_changed(stored: Path):
    EntityIndex.from_pretrained(stored.parent).verify()
    data = bytearray(stored.read_bytes())
    data[len(data) // 2] ^= 1
    stored.write_bytes(data)
    with pytest.raises(EntityIndexError, match="is damaged: its checksum differs"):
        EntityIndex.from_pretrained(stored.parent).verify()


def test_a_change_deletes_all_of_a_shortlist(stored: Path):
    EntityIndex.from_pretrained(stored.parent).remove(["e1"])
    assert not list(stored.parent.glob("first-stage-*"))
