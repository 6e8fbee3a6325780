"""The one text template, `head + " [SEP] " + body`, and which part of a text is read if not all of it fits.

Strings in, strings and tokens out. Knows no images and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import BatchFeature

from .spans_mimic import CHARACTERS_A_TOKEN, around_mention, checked_place
from .texts_mimic import needed_text


@dataclass
class TextTemplate:
    """How texts are read: a mention with its sentence, an entity's name with its description.

    Args:
        tokenizer: the backbone's.
        max_length: number of tokens of every text.
        separator: what stands between head and body.
    """

    tokenizer: Any
    max_length: int
    separator: str = " [SEP] "

    def filled(self, heads: Sequence[str], bodies: Sequence[str]) -> list[str]:
        """The template of each head and its body."""
        return [head + self.separator + body for head, body in zip(heads, bodies, strict=True)]

    def around_mentions(
        self,
        mentions: Sequence[str],
        texts: Sequence[str],
        starts: Sequence[int | None] | None,
        ends: Sequence[int | None] | None,
    ) -> list[str]:
        """The template of mentions; where a text does not fit, with the words around its mention, as many as fit.

        Args:
            mentions, texts: what each mention says, and its text.
            starts, ends: where it is in its text, in characters; if that is not known, the first place is taken.

        Raises:
            ValueError: if a place is not in its text.
        """
        filled = self.filled(mentions, texts)
        for row, tokens in enumerate(self._token_counts(filled, special=True)):
            if tokens <= self.max_length:
                continue
            mention, text = mentions[row], texts[row]
            place = checked_place(mention, text, starts and starts[row], ends and ends[row])
            if place is not None:
                filled[row] = self._around(mention, text, *place)
        return filled

    def _around(self, mention: str, text: str, start: int, end: int) -> str:
        """The template of one mention, filled with the words around it."""
        head = mention + self.separator
        room = self.max_length - self._token_counts([head], special=True)[0]
        while room > 0:
            first, last = around_mention(text, start, end, room, self._token_counts)
            filled = head + text[first:last]
            over = self._token_counts([filled], special=True)[0] - self.max_length
            if over <= 0 or (first, last) == (start, end):
                return filled
            room -= over  # words beside each other may take more tokens than each alone
        return head + text[start:end]

    def _token_counts(self, texts: Sequence[str], special: bool = False) -> list[int]:
        """How many tokens texts have; of a long one as many as show that it is too long."""
        cut = [text[: self.max_length * CHARACTERS_A_TOKEN] for text in texts]
        made = self.tokenizer(cut, add_special_tokens=special, padding=False, truncation=False, verbose=False)
        return [
            len(ids) if len(short) == len(text) else max(len(ids), self.max_length + 1)
            for ids, short, text in zip(made["input_ids"], cut, texts, strict=True)
        ]

    @property
    def usual_options(self) -> dict[str, Any]:
        """What the tokenizer is told unless a call says otherwise."""
        return {
            "padding": "max_length",
            "truncation": True,
            "max_length": self.max_length,
            "return_attention_mask": True,
            "return_tensors": "pt",
        }

    def tokenized(self, texts: list[str], **kwargs: Any) -> BatchFeature:
        """As [`MimicProcessor.tokenize`]."""
        options = {**self.usual_options, **kwargs}
        limit = options["max_length"]
        if options["truncation"] in (True, "longest_first", "only_first") and isinstance(limit, int):
            texts = [needed_text(self.tokenizer, text, limit) for text in texts]
        encoded = self.tokenizer(texts, **options)
        names = encoded.keys() if kwargs else ("input_ids", "attention_mask")
        return BatchFeature({name: encoded[name] for name in names})


__all__ = ["TextTemplate"]
