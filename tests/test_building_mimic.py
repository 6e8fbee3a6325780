"""A build that is interrupted and run again: what is kept of it must be what would be built now."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import picture, tiny_processor
from tiny_clip import tiny_model

from mimic_el.errors_mimic import EntityIndexError
from mimic_el.index_mimic import EntityIndex
from mimic_el.matching_mimic import EntityFeatures, Matcher
from mimic_el.modeling_mimic import MimicModel
from mimic_el.processing_mimic import MimicProcessor


class Interrupted(list[dict[str, Any]]):
    """A knowledge base that a user stops reading at its 25th entity."""

    def __getitem__(self, row: Any) -> Any:
        if row == 25:
            raise KeyboardInterrupt
        return super().__getitem__(row)


@pytest.fixture(scope="module")
def model() -> MimicModel:
    return tiny_model(text_max_length=24)


@pytest.fixture(scope="module")
def processor(model: MimicModel) -> MimicProcessor:
    return tiny_processor(model)


@pytest.mark.parametrize("form", ["a path", "the file's bytes"])
@pytest.mark.parametrize("before", ["unreadable", "another", "missing", "the same"])
def test_images_that_changed_are_encoded_again(
    form: str, before: str, model: MimicModel, processor: MimicProcessor, tmp_path: Path
):
    path = tmp_path / "image.png"

    def save(what: str) -> None:
        if what == "unreadable":
            path.write_bytes(b"no image")
        elif what == "missing":
            path.unlink(missing_ok=True)
        else:
            picture(3 if what == "another" else 4).save(path)

    def records() -> list[dict[str, Any]]:
        image: Any = str(path)
        if form == "the file's bytes":
            image = path.read_bytes() if path.exists() else None
        # The image is that of an entity of the second shard.
        return [{"id": f"P{row}", "name": f"P {row}", "images": [image] if row == 13 else []} for row in range(40)]

    options: dict[str, Any] = {"shard_entities": 10, "dtype": "float32", "show_progress": False}
    save(before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(KeyboardInterrupt):
            EntityIndex.build(model, processor, Interrupted(records()), tmp_path / "index", **options)
    if before != "the same":
        save("now")
        with pytest.warns(UserWarning, match="what was encoded after the first 10 entities is encoded again"):
            index = EntityIndex.build(model, processor, records(), tmp_path / "index", **options)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            index = EntityIndex.build(model, processor, records(), tmp_path / "index", **options)
    fresh = EntityIndex.build(model, processor, records(), **options)
    cpu = torch.device("cpu")
    for name, tensor in fresh._contents.store.full(slice(0, 40), cpu).tensors.items():
        torch.testing.assert_close(index._contents.store.full(slice(0, 40), cpu).tensors[name], tensor)
    index.verify()


def test_features_that_are_not_finite_are_refused_by_the_entitys_name(
    model: MimicModel, processor: MimicProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    encode = Matcher.entity_features

    def broken(matcher: Matcher, *args: Any) -> EntityFeatures:
        features = encode(matcher, *args)
        features.tensors["text_local"][2, 0] = torch.nan
        return features

    monkeypatch.setattr(Matcher, "entity_features", broken)
    kb = [{"id": f"P{row}", "name": f"P {row}"} for row in range(8)]
    for place in (None, tmp_path / "index"):
        with pytest.raises(EntityIndexError, match=r"`text_local` values that are not finite, of entity 'P[0-9]'"):
            EntityIndex.build(model, processor, kb, place, show_progress=False)
