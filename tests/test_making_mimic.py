"""Where indexes come from and where they go: places that are none."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import knowledge_base, tiny_processor
from tiny_clip import tiny_model

from mimic_el.errors_mimic import EntityIndexError
from mimic_el.index_mimic import EntityIndex
from mimic_el.pipeline_mimic import MultimodalEntityLinkingPipeline


@pytest.mark.parametrize(("place", "message"), [("", "is empty"), ("zero\0", "holds a zero byte")])
def test_a_path_that_is_none_stands_for_no_directory(
    place: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An empty one, as of a variable that is not set, would be the working directory."""
    model = tiny_model()
    processor = tiny_processor(model)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    entities = knowledge_base(2)
    stored = EntityIndex.build(model, processor, entities, tmp_path / "stored")
    in_memory: EntityIndex = EntityIndex.build(model, processor, entities)
    pipeline = MultimodalEntityLinkingPipeline(model=model, processor=processor, index=in_memory)
    for act in (
        lambda: EntityIndex.build(model, processor, entities, place),
        lambda: EntityIndex.build(model, processor, entities, place, shard=(0, 2), show_progress=False),
        lambda: in_memory.save_pretrained(place),
        lambda: stored.save_pretrained(place),
        lambda: EntityIndex.merge([tmp_path / "stored"], place),
        lambda: EntityIndex.merge([place], tmp_path / "merged"),
        lambda: pipeline.save_pretrained(place, save_index=True),
    ):
        with pytest.raises(EntityIndexError, match=message):
            act()
    with pytest.raises(EntityIndexError, match=r"is empty|no directory"):
        EntityIndex.from_pretrained(place)
    assert list(work.iterdir()) == []
