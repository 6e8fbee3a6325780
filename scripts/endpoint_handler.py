"""What Hugging Face Inference Endpoints run: `mimic-el push` uploads this file with a checkpoint, as `handler.py`.

It needs only what an endpoint has: transformers and torch. The model's code comes with the checkpoint.

    {"inputs": {"mention": "Orange", "text": "Orange opened a shop.", "image": "<base64>"}, "parameters": {"top_k": 3}}

`inputs` is one mention or document, or a list of them, as the pipeline takes them. Images are base64 or data URIs. The
answer is what the pipeline returns: for one input its list, for a list of inputs a list of these.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import pipeline

_MAX_IMAGE_BYTES = 10 * 2**20
_MAX_INPUTS = 256
_MAX_TEXT = 100_000
_MAX_SPANS = 1000
# What a request may set. Not here: what would load another model, or start processes.
_PARAMETERS = ("top_k", "candidates", "method", "min_probability", "coverage", "context_window", "on_error")


class EndpointHandler:
    """Links what a request holds.

    Args:
        path: the checkpoint's directory.

    Raises:
        OSError, ValueError: if there is no checkpoint, or it names no index.
    """

    def __init__(self, path: str = "") -> None:
        # A server that downloads what strangers name can be made to explore its own network; private addresses are
        # never read.
        allow_urls = os.environ.get("MIMIC_ALLOW_URLS") == "1"
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        load: Any = pipeline
        self._linker = load(
            "multimodal-entity-linking",
            model=path,
            trust_remote_code=True,
            device="cpu" if accelerator is None else str(accelerator),
            allow_urls=allow_urls,
            image_root=False,
        )
        _ = self._linker.index  # a checkpoint without an index is told at once, not at the first request

    def __call__(self, data: Mapping[str, Any]) -> list[Any]:
        """The answer to a request.

        Args:
            data: `inputs`, and perhaps `parameters`: of those of the pipeline's call, what concerns the answers.

        Raises:
            ValueError: if the request is not as described.
        """
        inputs, parameters = data.get("inputs"), data.get("parameters") or {}
        if not isinstance(parameters, Mapping):
            raise ValueError(f"`parameters` must be an object, got {type(parameters).__name__}.")
        if unknown := [name for name in parameters if name not in _PARAMETERS]:
            raise ValueError(
                f"No parameter {str(unknown[0])[:80]!r} is taken here; there are {', '.join(_PARAMETERS)}."
            )
        several = isinstance(inputs, list)
        items = inputs if isinstance(inputs, list) else [inputs]
        if len(items) > _MAX_INPUTS:
            raise ValueError(f"At most {_MAX_INPUTS} inputs are taken in one request, got {len(items)}.")
        read = [self._read(item) for item in items]
        options: dict[str, Any] = {"batch_size": 16, **parameters}
        # As from a generator, which the pipeline does not trust as it does a caller's own list.
        answers = list(self._linker((item for item in read), **options))
        return answers if several else answers[0]

    def _read(self, item: Any) -> dict[str, Any]:
        if not isinstance(item, Mapping):
            raise ValueError(
                'An input is an object such as {"mention": "Orange", "text": "Orange opened a shop.", "image": '
                f'"<base64>"}}, got {type(item).__name__}.'
            )
        text = item.get("text")
        if isinstance(text, str) and len(text) > _MAX_TEXT:
            raise ValueError(f"A text has at most {_MAX_TEXT:,} characters here, got {len(text):,}.")
        spans = item.get("spans")
        if isinstance(spans, list) and len(spans) > _MAX_SPANS:
            raise ValueError(f"A document has at most {_MAX_SPANS:,} `spans` here, got {len(spans):,}.")
        return {**item, "image": self._image(item.get("image"))}

    @staticmethod
    def _image(value: Any) -> str | None:
        """An image as it was sent. The pipeline reads base64 and data URIs, addresses where they are allowed, and never
        a path, which would be the server's."""
        if value is None or value == "":
            return None
        if not isinstance(value, str):
            raise ValueError(f"`image` is a string of base64 or a data URI, got {type(value).__name__}.")
        if len(value) > _MAX_IMAGE_BYTES * 4 // 3 + 1024:
            raise ValueError(f"`image` is larger than {_MAX_IMAGE_BYTES // 2**20} MB.")
        return value
