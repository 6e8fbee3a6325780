"""What each word and each patch of an image adds to a score: integrated gradients through the matcher.

A score is compared with the baseline's, which is the score of a mention and an entity with no text and no image. From
the baseline to the pair, the encoder's outputs move on a straight line, and the gradients along it are summed
(integrated gradients: Sundararajan, Taly and Yan, "Axiomatic Attribution for Deep Networks", ICML 2017). What this
gives each encoder output is passed on to the vectors of the encoder's first layer, one for each token and one for each
patch, in the same way with fewer points.

Knows the model and tensors, but nothing of words, records and image files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .features_mimic import EntityFeatures, MimicEncoderOutput, PairScores
from .modeling_mimic import MimicModel

# Points of the Gauss-Legendre rule through the matcher: doubled until the contributions add up.
_POINTS, _MOST_POINTS = 16, 512
# Points through each tower of the encoder.
POINTS = 4
# By how much they may miss, of the scores' difference or of one, whichever is more.
_TOLERANCE = 1e-4

Outputs = dict[str, Tensor]
OUTPUTS = ("text_embeds", "text_tokens", "image_embeds", "image_tokens")


@dataclass
class Encoded:
    """One mention or entity, as the encoder reads it.

    Args:
        inputs: `input_ids`, `attention_mask` and `pixel_values`, each of shape (1, ...).
        outputs: the encoder's four outputs by name, each of shape (1, ...).
        tokens: the first layer's vectors of the tokens, of shape (1, L, text width).
        patches: the first layer's vectors of the image, of shape (1, P, image width).
    """

    inputs: dict[str, Tensor]
    outputs: Outputs
    tokens: Tensor
    patches: Tensor

    @property
    def mask(self) -> Tensor:
        """The attention mask, of shape (1, L)."""
        return self.inputs["attention_mask"]


@dataclass
class Contributions:
    """What a mention or an entity adds to a score.

    Args:
        tokens (`numpy.ndarray` of shape `(L,)`, float64): of each token of its text.
        patches (`numpy.ndarray` of shape `(P,)`, float64): of each vector of its image.
        whole_image (`float`): of an image that is known by its stored features only.
    """

    tokens: np.ndarray
    patches: np.ndarray
    whole_image: float = 0.0

    @property
    def total(self) -> float:
        return float(self.tokens.sum() + self.patches.sum() + self.whole_image)


class Attribution:
    """Contributions to the scores of one model.

    Args:
        model ([`MimicModel`]): on any device; it is left as it was.
        empty: the model's inputs of an item with no text and no image: the baseline of mentions and entities.
        points: how often the encoder runs, forward and back, for each text and each image. The more, the more faithful.
    """

    def __init__(self, model: MimicModel, empty: Mapping[str, Tensor], points: int = POINTS) -> None:
        self._model = model
        self._points = points
        self._baseline = self.encode(empty)

    def encode(self, inputs: Mapping[str, Tensor]) -> Encoded:
        """Encodes one mention or entity: `input_ids`, `attention_mask` and `pixel_values`, each of shape (1, ...)."""
        model = self._model
        first: dict[str, Tensor] = {}
        given = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        encoder: Any = model.encoder
        with (
            _evaluating(model),
            torch.no_grad(),
            _first_layer(encoder.backbone.text_model, lambda output: first.setdefault("tokens", output)),
            _first_layer(encoder.backbone.vision_model, lambda output: first.setdefault("patches", output)),
        ):
            encoded: Any = model.encode(**given)
            outputs = {name: encoded[name] for name in OUTPUTS}
        # An encoder leaves padding out where it can; the first layer's vectors of all tokens are wanted.
        if first["tokens"].shape[1] != given["input_ids"].shape[1]:
            with _evaluating(model), torch.enable_grad():
                first.pop("tokens")
                with _first_layer(encoder.backbone.text_model, lambda output: first.setdefault("tokens", output)):
                    encoder.encode_texts(given["input_ids"], given["attention_mask"], whole=True)
        return Encoded(given, outputs, first["tokens"].detach(), first["patches"].detach())

    def entity_features(self, entity: Encoded) -> EntityFeatures:
        """What an index would store of an entity."""
        with torch.no_grad():
            return self._entity_features(entity.outputs, entity.mask)

    def scores(self, mention: Encoded, entity: Encoded, stored: Mapping[str, Tensor] | None = None) -> PairScores:
        """The scores of a pair, each of shape (1,); `stored` as in [`contributions`]."""
        with torch.no_grad():
            return self._scores(mention.outputs, mention.mask, self.entity_features(entity), stored or {})

    def baseline_scores(self, mention: Encoded, entity: Encoded) -> PairScores:
        """The scores of the baseline, with the attention masks of a pair."""
        empty = self._baseline.outputs
        with torch.no_grad():
            return self._scores(empty, mention.mask, self._entity_features(empty, entity.mask), {})

    def contributions(
        self, mention: Encoded, entity: Encoded, stored: Mapping[str, Tensor] | None = None
    ) -> tuple[Contributions, Contributions]:
        """What a mention and an entity add to the total score of the two.

        Args:
            mention, entity: from [`encode`].
            stored: features of the entity, of shape (1, ...), that replace those that its image would have given.

        Returns:
            those of the mention and of the entity; together they are the score less the baseline's, to within 1e-4 of
            that difference.
        """
        stored = stored or {}
        scores, baseline = self.scores(mention, entity, stored), self.baseline_scores(mention, entity)
        difference = float(scores.total - baseline.total)
        points = _POINTS
        while True:
            by_mention, by_entity, whole = self.mean_gradients(mention, entity, stored, points)
            found = self._amounts(mention, by_mention), self._amounts(entity, by_entity)
            missing = difference - sum(sum(amounts.values()) for amounts in found) - whole
            if abs(missing) <= _TOLERANCE * max(1.0, abs(difference)) or points >= _MOST_POINTS:
                break
            points *= 2
        of_mention = self._passed_on(mention, by_mention, found[0])
        of_entity = self._passed_on(entity, by_entity, found[1])
        of_entity.whole_image = whole
        return of_mention, of_entity

    def _scores(
        self, mention: Outputs, mask: Tensor, entity: EntityFeatures, stored: Mapping[str, Tensor]
    ) -> PairScores:
        matcher, encoded = self._model.matcher, MimicEncoderOutput(**mention)
        mentions = matcher.mention_features(encoded, mask.expand(len(encoded.text_embeds), -1))
        return matcher.score_pairs(mentions, EntityFeatures({**entity.tensors, **stored}))

    def _entity_features(self, outputs: Outputs, mask: Tensor) -> EntityFeatures:
        encoded = MimicEncoderOutput(**outputs)
        return self._model.matcher.entity_features(encoded, mask.expand(len(encoded.text_embeds), -1))

    def mean_gradients(
        self, mention: Encoded, entity: Encoded, stored: Mapping[str, Tensor], points: int
    ) -> tuple[Outputs, Outputs, float]:
        """Gradients of the total score by the outputs of both, averaged on the line from the baseline to the pair, by a
        Gauss-Legendre rule of so many points; and what `stored` adds."""
        device = mention.mask.device
        nodes, weights = np.polynomial.legendre.leggauss(points)
        places = torch.as_tensor((nodes + 1) / 2, dtype=torch.float32, device=device)
        weight = torch.as_tensor(weights / 2, dtype=torch.float32, device=device)

        def line(start: Tensor, end: Tensor) -> Tensor:
            start, end = start.detach().float(), end.detach().float()
            return (start + places.view(-1, *[1] * (end.dim() - 1)) * (end - start)).requires_grad_(True)

        empty = self._baseline.outputs
        start = self._entity_features(empty, entity.mask).tensors
        with torch.enable_grad():
            of_mention = {name: line(empty[name], tensor) for name, tensor in mention.outputs.items()}
            of_entity = {name: line(empty[name], tensor) for name, tensor in entity.outputs.items()}
            of_stored = {name: line(start[name], tensor) for name, tensor in stored.items()}
            features = self._entity_features(of_entity, entity.mask)
            scores = self._scores(of_mention, mention.mask, features, of_stored)
            lines = [*of_mention.values(), *of_entity.values(), *of_stored.values()]
            found = torch.autograd.grad((scores.total * weight).sum(), lines, allow_unused=True)
        means = [
            (torch.zeros_like(at) if one is None else one).sum(dim=0, keepdim=True)
            for at, one in zip(lines, found, strict=True)
        ]
        names, count = list(mention.outputs), len(mention.outputs)
        whole = sum(
            float((gradient * (stored[name] - start[name].detach())).double().sum())
            for name, gradient in zip(stored, means[2 * count :], strict=True)
        )
        return dict(zip(names, means[:count], strict=True)), dict(zip(names, means[count:], strict=False)), whole

    def _amounts(self, item: Encoded, gradients: Outputs) -> dict[str, float]:
        """What each of the encoder's outputs adds."""
        changes = {name: item.outputs[name].detach() - self._baseline.outputs[name].detach() for name in gradients}
        return {name: float((gradients[name] * changes[name].float()).double().sum()) for name in gradients}

    def _passed_on(self, item: Encoded, gradients: Outputs, amounts: Mapping[str, float]) -> Contributions:
        """What each token and patch that the encoder read adds, from what its outputs add."""
        encoder: Any = self._model.encoder
        inputs = {name: tensor.expand(self._points, *tensor.shape[1:]) for name, tensor in item.inputs.items()}

        def of_texts() -> tuple[Tensor, Tensor]:
            return encoder.encode_texts(inputs["input_ids"], inputs["attention_mask"], whole=True)[:2]

        def of_images() -> tuple[Tensor, Tensor]:
            return encoder.encode_images(inputs["pixel_values"], whole=True)[:2]

        with _evaluating(self._model), torch.enable_grad():
            tokens = self._through(
                encoder.backbone.text_model,
                of_texts,
                (gradients["text_embeds"], gradients["text_tokens"]),
                (self._baseline.tokens, item.tokens),
            )
            patches = self._through(
                encoder.backbone.vision_model,
                of_images,
                (gradients["image_embeds"], gradients["image_tokens"]),
                (self._baseline.patches, item.patches),
            )
        return Contributions(
            tokens=adjusted(tokens, amounts["text_embeds"] + amounts["text_tokens"]),
            patches=adjusted(patches, amounts["image_embeds"] + amounts["image_tokens"]),
        )

    def _through(
        self,
        tower: nn.Module,
        encode: Callable[[], tuple[Tensor, Tensor]],
        gradients: tuple[Tensor, Tensor],
        ends: tuple[Tensor, Tensor],
    ) -> np.ndarray:
        """Integrated gradients of a weighted sum of a tower's outputs by its first layer's vectors."""
        start, end = ends
        change = end - start
        if not bool(change.any()):
            return np.zeros(change.shape[1])
        nodes, weights = np.polynomial.legendre.leggauss(self._points)
        places = torch.as_tensor((nodes + 1) / 2, dtype=change.dtype, device=change.device).view(-1, 1, 1)
        vectors = (start + places * change).requires_grad_(True)
        with _first_layer(tower, lambda _: vectors):
            outputs = encode()
        weighted = [
            (gradient.to(output) * output).flatten(1).sum(dim=1)
            for gradient, output in zip(gradients, outputs, strict=True)
        ]
        weight = torch.as_tensor(weights / 2, dtype=torch.float32, device=change.device)
        total = (torch.stack(weighted).float().sum(dim=0) * weight).sum()
        (by_vector,) = torch.autograd.grad(total, [vectors])
        return (by_vector.float().sum(dim=0) * change[0].float()).sum(dim=-1).double().cpu().numpy()


def adjusted(estimates: np.ndarray, total: float) -> np.ndarray:
    """Estimates changed so that they add up to a total, each in proportion to its size."""
    sizes = np.abs(estimates)
    if not sizes.sum():
        return np.full_like(estimates, total / max(1, len(estimates)))
    return estimates + (total - estimates.sum()) * sizes / sizes.sum()


@contextmanager
def _first_layer(tower: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Puts what a function makes of it in the place of a tower's first vectors, those of its tokens or patches."""
    layer = next(module for name, module in tower.named_modules() if name.rpartition(".")[2] == "embeddings")
    handle = layer.register_forward_hook(lambda _, __, output: change(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


__all__ = ["POINTS", "Attribution", "Contributions", "Encoded", "adjusted"]
