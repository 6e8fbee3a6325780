"""The words around a mention: one implementation, in the processor, for training, evaluation, index and pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_processor
from tiny_clip import tiny_model

from mimic_el import KnowledgeBase, MentionEntityCollator, MimicTrainer, MimicTrainingArguments
from mimic_el.configuration_mimic import MimicConfig
from mimic_el.processing_mimic import MimicProcessor

LENGTH = 60  # letters, of which each is a token
FAR = "far " * 30
LONG = f"{FAR}a shop of Orange opened {FAR}".strip()
START = LONG.index("Orange")
ENTITIES = [{"id": "orange", "name": "Orange", "description": "A company.", "images": []}]


@pytest.fixture
def processor() -> MimicProcessor:
    made = tiny_processor(tiny_model())
    made.text_max_length = LENGTH
    return made


def words(processor: MimicProcessor, text: str) -> int:
    return len(processor.tokenizer(text)["input_ids"])


def test_what_fits_is_read_as_it_is(processor: MimicProcessor):
    for text in ("", "Orange", "a shop of Orange"):
        [filled] = processor.mention_texts(["Orange"], [text], context_window="mention")
        assert filled == f"Orange [SEP] {text}"


def test_as_many_whole_words_as_fit(processor: MimicProcessor):
    for place in ({"starts": [START], "ends": [START + 6]}, {}):
        [filled] = processor.mention_texts(["Orange"], [LONG], context_window="mention", **place)
        head, _, part = filled.partition(" [SEP] ")
        assert head == "Orange"
        at = LONG.index(part)
        assert at <= START < START + 6 <= at + len(part)
        assert LONG[at - 1] == " " == LONG[at + len(part)], "whole words"
        assert words(processor, filled) <= LENGTH
        for more in (LONG[: at + len(part)].split()[-len(part.split()) - 1 :], [*part.split(), "far"]):
            assert words(processor, "Orange [SEP] " + " ".join(more)) > LENGTH, "one more word would not fit"
        left, right = words(processor, LONG[at:START]), words(processor, LONG[START + 6 : at + len(part)])
        assert abs(left - right) <= words(processor, "opened") - 2 + 1, "in balance, but for a word"


def test_the_place_decides_which_occurrence_is_meant(processor: MimicProcessor):
    text = f"Orange one {FAR} Orange two"
    second = text.rindex("Orange")
    [first_read] = processor.mention_texts(["Orange"], [text], context_window="mention")
    [second_read] = processor.mention_texts(["Orange"], [text], [second], [second + 6], "mention")
    assert "one" in first_read
    assert "two" not in first_read
    assert second_read.endswith("Orange two")
    [absent] = processor.mention_texts(["Apple"], [text], context_window="mention")
    assert absent == f"Apple [SEP] {text}", "it does not occur: from the start"


@pytest.mark.parametrize(
    "text", ["x" * 5000 + "Orange" + "y" * 5000, "京" * 3000 + "Orange" + "京" * 3000, "Orange" + " " * 9000 + "z"]
)
def test_texts_without_usual_words(text: str, processor: MimicProcessor):
    [filled] = processor.mention_texts(["Orange"], [text], context_window="mention")
    assert "Orange" in filled.partition(" [SEP] ")[2]
    assert processor.tokenize([filled])["input_ids"].shape == (1, LENGTH)


def test_a_mention_longer_than_what_is_read(processor: MimicProcessor):
    mention = "word " * 60
    [filled] = processor.mention_texts([mention], [f"{FAR}{mention}{FAR}"], context_window="mention")
    assert filled.startswith(mention)


def test_start_is_what_it_was(processor: MimicProcessor):
    """Bit for bit, whatever places are given."""
    plain = processor.tokenize([f"Orange [SEP] {LONG}"])
    for options in ({}, {"starts": [START], "ends": [START + 6]}, {"context_window": "start"}):
        made = processor.process_mentions(["Orange"], [LONG], **options)
        assert torch.equal(made["input_ids"], plain["input_ids"])
    one = processor.process_mentions("Orange", LONG, starts=START, ends=START + 6, context_window="mention")
    assert not torch.equal(one["input_ids"], plain["input_ids"])


def test_training_and_evaluation_read_the_same(processor: MimicProcessor):
    mention: dict[str, Any] = {"id": "m", "mention": "Orange", "sentence": LONG, "image": None, "answer": "orange"}
    collator = MentionEntityCollator(processor, KnowledgeBase(ENTITIES))
    for window in ("start", "mention"):
        processor.context_window = window
        expected = processor.process_mentions(["Orange"], [LONG], context_window=window)
        for row in (mention, {**mention, "start": START, "end": START + 6}, {**mention, "start": None, "end": None}):
            assert torch.equal(collator.encode_mentions([row])["input_ids"], expected["input_ids"])
            assert torch.equal(collator([row])["input_ids"], expected["input_ids"])
    with pytest.raises(ValueError, match="Mention 'm': The span from 9000 to 9006 is not in the text"):
        collator.encode_mentions([{**mention, "id": "a"}, {**mention, "start": 9000}])


def test_it_travels(processor: MimicProcessor, tmp_path: Path):
    model = tiny_model(context_window="mention")
    own = MimicProcessor.from_pretrained
    processor.context_window = "mention"
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert MimicConfig.from_pretrained(tmp_path).context_window == "mention"
    assert own(tmp_path).context_window == "mention"
    assert MimicConfig().context_window == "start"
    for owner in (
        MimicConfig,
        lambda **options: MimicProcessor(processor.image_processor, processor.tokenizer, **options),
    ):
        with pytest.raises(ValueError, match="`context_window` must be one of start, mention, got 'middle'"):
            owner(context_window="middle")


def test_a_processor_that_reads_otherwise_than_the_model(processor: MimicProcessor, tmp_path: Path):
    model = tiny_model(context_window="mention")
    arguments = MimicTrainingArguments(str(tmp_path))
    with pytest.raises(
        ValueError, match="processor's `context_window` is 'start', the model's configuration says 'mention'"
    ):
        MimicTrainer(model, arguments, entities=ENTITIES, processing_class=processor)
