"""One state of an index, and the next: a search is of one, whatever other threads change meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from tiny import encode_mentions, knowledge_base, mentions_of, small_shards, tiny_processor
from tiny_clip import tiny_model

from mimic_el.errors_mimic import UnknownEntityError
from mimic_el.index_mimic import EntityIndex


def test_readers_while_a_writer_removes_adds_and_compacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is removed and added is never an answer, so every search has the same one."""
    small_shards(monkeypatch, 4)
    model = tiny_model(text_max_length=24)
    processor = tiny_processor(model)
    real = knowledge_base(9)
    others = [{"id": f"d{row}", "name": "zzz", "description": ""} for row in range(24)]
    index = EntityIndex.build(model, processor, [*others, *real], tmp_path, show_progress=False)
    mentions = encode_mentions(model, processor, mentions_of(real))
    candidates = [[entity["id"] for entity in real]] * len(real)
    answers = [entity["id"] for entity in real]
    expected = index.search(mentions, 3, candidates=candidates)
    ranks = EntityIndex.build(model, processor, real, show_progress=False).rank(mentions, answers).ranks
    stop, count = threading.Event(), [0]
    wrong: list[Any] = []

    def reader() -> None:
        while not stop.is_set():
            try:
                found = index.search(mentions, 3, candidates=candidates)
                names = index.link_encoded(mentions, 1, candidates=candidates)
                if found.entity_ids != expected.entity_ids or "e4" not in index or index.entity("e4")["id"] != "e4":
                    wrong.append(found.entity_ids)
                if [row[0]["entity_id"] for row in names] != [row[0] for row in expected.entity_ids]:
                    wrong.append(names)
                count[0] += 1
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=reader) for _ in range(3)]
    for thread in threads:
        thread.start()
    for row in range(0, 24, 8):
        index.remove([f"d{other}" for other in range(row, row + 8)])
        index.add(model, processor, [{"id": f"n{row}", "name": "zzz"}], show_progress=False)
        index.compact()
        index.remove([f"n{row}"])
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert count[0] > 0
    index.compact()
    assert index.rank(mentions, answers).ranks.tolist() == ranks.tolist()


def test_an_id_that_is_no_text():
    model = tiny_model(text_max_length=24)
    index = EntityIndex.build(model, tiny_processor(model), knowledge_base(2), show_progress=False)
    for strange in ("\ud800", "e1\udc00", 1.5, None, "", True):
        assert strange not in index
    for strange in ("\ud800", "e1\udc00"):
        with pytest.raises(UnknownEntityError):
            index.entity(strange)
        with pytest.raises(UnknownEntityError):
            index.remove([strange])
