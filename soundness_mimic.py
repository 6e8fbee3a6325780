"""Checks whether stored features of entities can come from a model's matcher: what `verify` checks beyond checksums.

A checksum shows that a file is as it was written, but not that what was written was right. Most features follow from a
few of them, and these come from layer norms, whose output has a largest length. Numbers that break these rules come
from no encoder, whatever it read. Knows the units and how features are stored, but not files.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .features_mimic import add_prefix, pick_prefix
from .matching_mimic import Matcher, VisionDualDirection

_ROWS_AT_ONCE = 1024
# By how much, beside their lengths, features may differ from what follows from others. Rounding in storage is counted
# apart; this is for matchers whose layers compute in few bits.
_TOLERANCE = 0.1
_STATS_TOLERANCE = 1e-3
_NOT_OF_VECTORS = ("w.A", "beta.n")
_STEPS = {torch.int8: 1 / 254, torch.float16: 2**-11}
# The smallest numbers have fewer bits: they are that far from what they were, however small they are.
_LEAST_STEPS = {torch.float16: 2**-25}


def impossible_feature(matcher: Matcher, stored: Mapping[str, Tensor], kept: Tensor) -> tuple[str, Tensor] | None:
    """The first feature that the matcher cannot have given, and the rows whose it is; `None` where all may be.

    Args:
        matcher: of the model that made the features.
        stored: features of N entities as an index stores them, all finite.
        kept (`torch.BoolTensor` of shape `(N,)`): the entities that are looked at.
    """
    laws = _Laws(matcher)
    for start in range(0, len(kept), _ROWS_AT_ONCE):
        part = {name: tensor[start : start + _ROWS_AT_ONCE] for name, tensor in stored.items()}
        for name, broken in laws.broken(part):
            rows = (broken & kept[start : start + _ROWS_AT_ONCE]).nonzero().squeeze(1) + start
            if len(rows):
                return name, rows
    return None


@dataclass(frozen=True)
class _Law:
    """A feature, or a column of one, follows from another.

    Args:
        name, source: what follows, and from what.
        gain: how many times as long as its source it may be.
        rest: how long it may be beside that.
        column: which of its numbers follows, if not all.
    """

    name: str
    source: str
    gain: Tensor | float = 0.0
    rest: Tensor | float = 0.0
    column: int | None = None


class _Laws:
    """What features of a matcher keep to. In float64: squares of any float32 are finite there."""

    def __init__(self, matcher: Matcher) -> None:
        matcher = copy.deepcopy(matcher).cpu().double()
        self.text, self.vdlu = matcher.tglu, matcher.vdlu
        self.query, self.key = matcher.vdlu.dual_ent2men, matcher.vdlu.dual_men2ent
        self.texts, self.fused = matcher.text_cls_layernorm, matcher.cmfu.gate_layer_norm
        tokens, image, patches = (
            _longest(norm)
            for norm in (matcher.text_tokens_layernorm, matcher.image_cls_layernorm, matcher.image_tokens_layernorm)
        )
        self.largest = {
            "text_query": _most(self.text.fc_query, tokens) * self.text.scale,
            "image_query_q": _most(self.query.cls_fc, image),
            "image_key_z": _most(self.key.tokens_fc, patches),
            "image_key_k": _most(self.key.cls_fc, image),
        }
        local, own, second = self.text.fc_cls, self.text.layer_norm, self.query.layer_norm
        scale, longest = own.weight.abs().amax(), _longest(second)
        gate, bias, key_gate = _column("QUERY", "w.A"), _column("QUERY", "beta.n"), _column("KEY", "w.A")
        of_query, of_key = (_gain(side.fc) * side.add_layer_norm.weight.abs().amax() for side in (self.query, self.key))
        self.laws = [
            _Law("text_local", "text_embed", scale * _gain(local), scale * local.bias.norm()),
            _Law("text_bias", "text_embed", own.bias.norm() * _gain(local), own.bias.norm() * local.bias.norm()),
            _Law("image_query_a", "image_query_q", of_query),
            _Law("image_query_m", "image_query_q", rest=second.weight.abs().amax() * longest),
            _Law("image_query_stats", "image_query_q", _gain(self.query.gate_fc) * of_query, column=gate),
            _Law("image_query_stats", "image_query_q", rest=second.bias.norm() * longest, column=bias),
            _Law("image_key_a", "image_key_z", of_key),
            _Law("image_key_stats", "image_key_z", _gain(self.key.gate_fc) * of_key, column=key_gate),
        ]

    @torch.inference_mode()
    def broken(self, stored: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Names of features, and which rows break a law of theirs, (N,)."""
        wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in stored.items()}
        values = {name: _dequantized(wide, name) for name in wide if not name.endswith("_scale")}
        step = {name: _step(stored[name], values[name]) for name in values}
        if "text_mask" in stored:
            yield "text_mask", ~stored["text_mask"].any(dim=1)
        for name, norm in (("text_embed", self.texts), ("cross_modal", self.fused)):
            yield name, ~_is_normalized(values[name], norm, step[name])
        for name, largest in self.largest.items():
            vectors = values[name]
            length = vectors.norm(dim=-1).view(len(vectors), -1)  # of each token, where there are several
            within = length <= (1 + _TOLERANCE) * largest + step[name] * vectors.shape[-1] ** 0.5
            yield name, ~within.all(dim=1)
        yield from self._not_following(values, step)
        yield from self._wrong_stats(values)

    def _not_following(self, values: dict[str, Tensor], step: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """What does not follow from the feature that it is made of."""
        q = values["image_query_q"]
        of_query = self.query.query_features_of(q, self.query.layer_norm(q))
        of_key = self.key.key_features_of(values["image_key_z"], values["image_key_k"])
        following = (
            self.text.local_features(values["text_embed"])
            | add_prefix("image_query_", of_query)
            | add_prefix("image_key_", of_key)
        )
        for law in self.laws:
            source, made, found = values[law.source], following[law.name], values[law.name]
            if law.column is not None:
                made, found = made[:, law.column], found[:, law.column]
            made, found = made.view(len(made), -1), found.view(len(found), -1)
            length = law.gain * source.norm(dim=-1) + law.rest + found.norm(dim=-1)
            moved = law.gain * step[law.source] * source.shape[-1] ** 0.5 + step[law.name] * found.shape[-1] ** 0.5
            yield law.name, ~((made - found).norm(dim=-1) <= _TOLERANCE * length + moved[:, 0] + 1e-6)

    def _wrong_stats(self, values: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Numbers of one side that are not those of its vectors, from which they were made as these were stored."""
        made = self.vdlu.entity_stats(values, values)
        for side, unit, names in (
            ("image_query_", self.query, VisionDualDirection.QUERY_STATS),
            ("image_key_", self.key, VisionDualDirection.KEY_STATS),
        ):
            name, vectors = side + "stats", pick_prefix(side, values)
            yield name, _stats_differ(values[name], made[name], vectors, unit, names)


# --- Lengths


def _longest(norm: nn.LayerNorm) -> Tensor:
    """The length that an output of a layer norm cannot exceed."""
    return norm.weight.abs().amax() * norm.normalized_shape[0] ** 0.5 + norm.bias.norm()


def _gain(layer: nn.Linear) -> Tensor:
    """How many times as long a layer may make a vector, its bias apart."""
    return torch.linalg.matrix_norm(layer.weight, 2)


def _most(layer: nn.Linear, longest: Tensor) -> Tensor:
    """The length that a layer's output cannot exceed, of inputs of a largest length."""
    return _gain(layer) * longest + layer.bias.norm()


def _step(stored: Tensor, values: Tensor) -> Tensor:
    """How far each number of a row, (N, 1), may be from what it was before it was stored."""
    largest = values.abs().flatten(1).amax(dim=1, keepdim=True) if values.dim() > 1 else values.abs().unsqueeze(1)
    return _STEPS.get(stored.dtype, 1e-6) * largest + _LEAST_STEPS.get(stored.dtype, 0.0)


def _dequantized(stored: Mapping[str, Tensor], name: str) -> Tensor:
    """In float64: in float32 the product of a number and its scale may be infinite."""
    values, scale = stored[name].double(), stored.get(name + "_scale")
    return values if scale is None else values * scale.unsqueeze(-1)


def _column(side: str, name: str) -> int:
    return getattr(VisionDualDirection, f"{side}_STATS").index(name)


# --- Laws


def _is_normalized(values: Tensor, norm: nn.LayerNorm, step: Tensor) -> Tensor:
    """Which vectors may be a layer norm's output: `(x - beta) / gamma` has at most the length `sqrt(d)`."""
    least = ((values - norm.bias).abs() - step - 1e-4).clamp(min=0)
    scale = norm.weight.abs().clamp(min=1e-12)
    return (least / scale).square().sum(dim=-1) <= (1 + _TOLERANCE) * values.shape[-1]


def _stats_differ(
    stats: Tensor, made: Tensor, vectors: dict[str, Tensor], side: VisionDualDirection, names: tuple[str, ...]
) -> Tensor:
    """Which rows of the numbers of one side are not those of its vectors."""
    size = {name: vector.norm(dim=-1) for name, vector in vectors.items()}
    size["h0"] = side.fc(side.add_layer_norm.bias).norm()
    wrong = torch.zeros(len(stats), dtype=torch.bool)
    for column, name in enumerate(names):
        if name == "upper_bound":
            allowed = side.size**0.5 * size["m"]
        elif name in _NOT_OF_VECTORS:
            continue
        else:
            one, other = name.split(".")
            allowed = size[one] * size[other]
        wrong |= ~((stats[:, column] - made[:, column]).abs() <= _STATS_TOLERANCE * (1e-3 + allowed))
    return wrong


__all__ = ["impossible_feature"]
