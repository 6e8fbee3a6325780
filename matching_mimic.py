"""The matcher: features of mentions and of entities, and the three units that score each pair of them.

The model is that of Luo et al., "Multi-Grained Multimodal Interaction Network for Entity Linking" (KDD 2023). Each unit
is written as features of the entity, features of the mention, and a score of the two, so that a knowledge base is
encoded once and a pair costs little. The scores are those of the published equations, term by term.

This is the one place that knows the names of features, the numbers that the units keep beside their vectors, and the
weights of the total. It does not know what encodes texts and images, nor how features are stored or searched.

Shapes: M mentions, N entities, L text tokens, P image tokens (the class token and the patches).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from .configuration_mimic import MimicConfig

# The total is the mean of the units' scores; the text and the image unit are themselves means of two parts.
UNITS = 3
HALF_UNITS = 2 * UNITS
# Expanded squares lose digits where the terms of a sum nearly cancel. Where a square is below this fraction of its
# terms, the pair is computed again without the expansion (see `VisionDualDirection`); above it, errors grow tenfold at
# most.
_CANCELLATION = 0.1
_PAIRS_AT_ONCE = 2**15


@dataclass
class MimicEncoderOutput(ModelOutput):
    """What the encoder makes of a batch of B mentions or entities.

    Args:
        text_embeds (`torch.Tensor` of shape `(B, projection_dim)`): pooled text, of length 1.
        text_tokens (`torch.Tensor` of shape `(B, L, text hidden size)`): last hidden state of the text, padding too.
        image_embeds (`torch.Tensor` of shape `(B, image_hidden_size)`): pooled image.
        image_tokens (`torch.Tensor` of shape `(B, P, image_hidden_size)`): last hidden state of the image.
    """

    text_embeds: Tensor = None  # type: ignore[assignment]
    text_tokens: Tensor = None  # type: ignore[assignment]
    image_embeds: Tensor = None  # type: ignore[assignment]
    image_tokens: Tensor = None  # type: ignore[assignment]


@dataclass
class PairScores:
    """Scores of pairs of mentions and entities, all of one shape: of the three units, and their mean."""

    total: Tensor
    text: Tensor
    image: Tensor
    cross_modal: Tensor


class _Features:
    """Named tensors of the same first dimension, one row an item."""

    # What the features are of. Not told by the class: code that a checkpoint brings has classes of its own.
    side = ""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        counts = {name: tensor.shape[0] for name, tensor in tensors.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"{type(self).__name__}: the tensors differ in their first dimension: {counts}.")
        self.tensors = tensors

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0] if self.tensors else 0

    @property
    def device(self) -> torch.device:
        return self.tensors["text_embed"].device

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors["text_embed"].dtype

    def __getitem__(self, rows: slice | Tensor) -> Self:
        """The items that a slice, or a tensor of indices or booleans, picks; a slice makes views."""
        if not isinstance(rows, slice | Tensor):
            raise TypeError(f"{type(self).__name__} is indexed by a slice or a tensor, not {type(rows).__name__}.")
        return self._map(lambda tensor: tensor[rows])

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}={tuple(tensor.shape[1:])}" for name, tensor in self.tensors.items())
        return f"{type(self).__name__}({len(self)} items: {shapes})"

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return type(self)({name: function(tensor) for name, tensor in self.tensors.items()})

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The features moved or cast, with the arguments of `torch.Tensor.to`; masks are moved only."""

        def move(tensor: Tensor) -> Tensor:
            moved = tensor.to(*args, **kwargs)
            return moved if tensor.is_floating_point() else tensor.to(moved.device)

        return self._map(move)

    def detach(self) -> Self:
        return self._map(Tensor.detach)

    @classmethod
    def cat(cls, parts: Iterable[Self]) -> Self:
        """The items of several batches in one."""
        parts = list(parts)
        if not parts:
            raise ValueError(f"{cls.__name__}.cat: nothing to join.")
        return cls({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


class EntityFeatures(_Features):
    """Features of N entities, as [`MimicModel.encode_entities`] makes them; indexed by entity."""

    side = "entity"


class MentionFeatures(_Features):
    """Features of M mentions, as [`MimicModel.encode_mentions`] makes them; indexed by mention."""

    side = "mention"


# --- Arithmetic ---------------------------------------------------------------------------------------------------
# All of a unit's arithmetic is done in float32 (or float64, for a model in float64): its cost is small beside the
# encoder's, and its expanded sums lose too many digits in half precision.


def widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, layer.weight.to(x.dtype), bias)


def layer_norm_in(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, layer.normalized_shape, layer.weight.to(x.dtype), layer.bias.to(x.dtype), layer.eps)


def centered(x: Tensor) -> Tensor:
    x = x - x.mean(dim=-1, keepdim=True)
    return x - x.mean(dim=-1, keepdim=True)  # the rounding error of a large mean


def dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dim=-1)


class TextGlobalLocalUnit(nn.Module):
    """TGLU: the dot product of the pooled texts, and an attention of the entity's tokens over the mention's.

    The attention's part is `<e, LN(c)>` with `e = fc_cls(t_e)` and `c` the mean over the entity's tokens of the
    attended values. With `p` the mean attention weight of each mention token, `c = p U`, and a layer norm ignores the
    mean of what it normalises, so only the centred rows of U and the centred `gamma * e` are needed.
    """

    def __init__(self, config: MimicConfig) -> None:
        super().__init__()
        size = config.tglu_hidden_size
        self.mask_padding = config.mask_text_padding
        self.fc_query = nn.Linear(config.text_width, size)
        self.fc_key = nn.Linear(config.text_width, size)
        self.fc_value = nn.Linear(config.text_width, size)
        self.fc_cls = nn.Linear(config.text_embed_width, size)
        self.layer_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)

    def entity_features(self, embeds: Tensor, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        local = linear(self.fc_cls, embeds)
        queries = linear(self.fc_query, tokens) * self.fc_query.out_features**-0.5
        features = {
            "text_embed": embeds,
            "text_query": queries,
            "text_local": centered(self.layer_norm.weight.to(local.dtype) * local),
            "text_bias": local @ self.layer_norm.bias.to(local.dtype),
        }
        if self.mask_padding:
            features["text_mask"] = mask.bool()
        return features

    def mention_features(self, embeds: Tensor, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        features = {
            "text_embed": embeds,
            "text_key": linear(self.fc_key, tokens),
            "text_value": centered(linear(self.fc_value, tokens)),
        }
        if self.mask_padding:
            features["text_mask"] = mask.bool()
        return features

    def attention(self, mention: dict[str, Tensor], entity: dict[str, Tensor]) -> Tensor:
        """Mean over the entity's tokens of the attention over the mention's, of shape (M, N, L)."""
        queries, keys = widened(entity["text_query"]), widened(mention["text_key"])
        # (N, L, M, L): one matrix product for all pairs is nearly twice as fast as one for each mention.
        logits = (queries.flatten(0, 1) @ keys.flatten(0, 1).T).view(*queries.shape[:2], *keys.shape[:2])
        if not self.mask_padding:
            return logits.softmax(dim=-1).mean(dim=1).transpose(0, 1)
        logits = logits.masked_fill(~mention["text_mask"], -torch.inf)
        query_mask = entity["text_mask"].to(logits.dtype)[:, :, None, None]
        return ((logits.softmax(dim=-1) * query_mask).sum(dim=1) / query_mask.sum(dim=1)).transpose(0, 1)

    def local_score(self, mention: dict[str, Tensor], entity: dict[str, Tensor], attention: Tensor) -> Tensor:
        """`<e, LN(c)>` of shape (M, N), from the attention."""
        context = attention @ widened(mention["text_value"])
        length = (context.square().mean(dim=-1) + self.layer_norm.eps).rsqrt()
        return dot(context, widened(entity["text_local"])) * length + entity["text_bias"]

    def global_score(self, mention: dict[str, Tensor], entity: dict[str, Tensor]) -> Tensor:
        return widened(mention["text_embed"]) @ widened(entity["text_embed"]).T

    def score(self, mention: dict[str, Tensor], entity: dict[str, Tensor]) -> Tensor:
        local = self.local_score(mention, entity, self.attention(mention, entity))
        return (self.global_score(mention, entity) + local) / 2

    def local_pairs(self, mention: dict[str, Tensor], entity: dict[str, Tensor]) -> Tensor:
        """`<e, LN(c)>` of each of G mentions with W entities of its own, (G, W); the entities' tensors are (G, W, ...).

        A mention's keys serve all of its entities: copying them for each pair would take longer than the attention.
        """
        queries, keys = widened(entity["text_query"]), widened(mention["text_key"])
        logits = queries.flatten(1, 2) @ keys.transpose(1, 2)
        if self.mask_padding:
            logits = logits.masked_fill(~mention["text_mask"].unsqueeze(1), -torch.inf)
        weights = logits.softmax(dim=-1).unflatten(1, queries.shape[1:3])
        if self.mask_padding:
            query_mask = entity["text_mask"].to(weights.dtype).unsqueeze(-1)
            attention = (weights * query_mask).sum(dim=2) / query_mask.sum(dim=2)
        else:
            attention = weights.mean(dim=2)
        context = attention @ widened(mention["text_value"])
        length = (context.square().mean(dim=-1) + self.layer_norm.eps).rsqrt()
        return dot(context, widened(entity["text_local"])) * length + entity["text_bias"]

    def score_pairs(self, mention: dict[str, Tensor], entity: dict[str, Tensor], local: Tensor | None = None) -> Tensor:
        """Scores of aligned pairs, of shape (pairs,); `local` are their [`local_pairs`], if these are known."""
        if local is None:
            local = self.local_pairs(mention, {name: tensor.unsqueeze(1) for name, tensor in entity.items()})[:, 0]
        return (dot(widened(mention["text_embed"]), widened(entity["text_embed"])) + local) / 2


def _column(stats: Tensor, names: tuple[str, ...], name: str) -> Tensor:
    """One of the named numbers that a side keeps beside its vectors."""
    return stats[:, names.index(name)]


class VisionDualDirection(nn.Module):
    """One direction of VDLU: a gated layer norm of the key side, compared with the query side.

    For the query vector q, the key vector k and the key side's tokens Z, with `q' = W1 q + b1`, `k' = W1 k + b1` and
    `z = mean(W2 Z + b2)`:

        h = W3 LNa(z + q') + b3,  g = tanh(w . h + b),  score = <LNb(g h + k'), LNb(q')>

    Writing x~ for x without its mean, `LNa(z + q') = gamma_a * (z~ + q~) r + beta_a` with
    `r = 1 / sqrt(|z~ + q~|^2 / d + eps)`, so `h = r (A_z + A_q) + h0` where `A_x = W3 (gamma_a * x~)` belongs to one
    side and `h0 = W3 beta_a + b3` to neither. The second layer norm is a division by the length of
    `y~ = g r (A_z~ + A_q~) + g h0~ + k~`. All of it follows from five dot products of a side's vector with the other
    side's, and from numbers of one side.
    """

    # Numbers of one side, stacked in the last dimension of its "_stats".
    KEY_STATS = ("z.z", "a.a", "k.k", "a.h0", "a.k", "h0.k", "w.A")
    QUERY_STATS = ("q.q", "a.a", "a.h0", "a.m", "h0.m", "w.A", "beta.n", "most")

    def __init__(self, config: MimicConfig) -> None:
        super().__init__()
        size = config.vdlu_hidden_size
        self.cls_fc = nn.Linear(config.image_hidden_size, size)
        self.tokens_fc = nn.Linear(config.image_hidden_size, size)
        self.fc = nn.Linear(size, size)
        self.gate_fc = nn.Linear(size, 1)
        self.add_layer_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.layer_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)

    def _project(self, x: Tensor) -> Tensor:
        """`A_x` of a centred x."""
        return F.linear(self.add_layer_norm.weight.to(x.dtype) * x, self.fc.weight.to(x.dtype))

    def _offset(self, dtype: torch.dtype) -> Tensor:
        """`h0`."""
        return linear(self.fc, self.add_layer_norm.bias.to(dtype))

    def _gate(self, x: Tensor) -> Tensor:
        """`w . x`, without the bias."""
        return x @ self.gate_fc.weight[0].to(x.dtype)

    def key_features(self, embeds: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """`z`: z~; `a`: A_z~; `k`: k~; and the numbers of `KEY_STATS`."""
        z = centered(linear(self.tokens_fc, tokens.mean(dim=1)))
        projected = self._project(z)
        vectors = {"z": z, "a": centered(projected), "k": centered(linear(self.cls_fc, embeds))}
        return {**vectors, "stats": self.key_stats(vectors, self._gate(projected))}

    def key_stats(self, vectors: dict[str, Tensor], gate: Tensor) -> Tensor:
        """The numbers of `KEY_STATS` for given vectors, of shape (N, 7); `gate` is w . A_z."""
        z, a, k = (widened(vectors[name]) for name in ("z", "a", "k"))
        h0 = centered(self._offset(z.dtype))
        return torch.stack([dot(z, z), dot(a, a), dot(k, k), a @ h0, dot(a, k), k @ h0, gate], dim=-1)

    def query_features(self, embeds: Tensor) -> dict[str, Tensor]:
        """`q`: q~; `a`: A_q~; `m`: (gamma_b * n)~ with n = LNb(q'); and the numbers of `QUERY_STATS`."""
        query = linear(self.cls_fc, embeds)
        q = centered(query)
        projected = self._project(q)
        n = layer_norm_in(self.layer_norm, query)
        m = centered(self.layer_norm.weight.to(n.dtype) * n)
        vectors = {"q": q, "a": centered(projected), "m": m}
        bias = n @ self.layer_norm.bias.to(n.dtype)
        return {**vectors, "stats": self.query_stats(vectors, self._gate(projected), bias)}

    def query_stats(self, vectors: dict[str, Tensor], gate: Tensor, bias: Tensor) -> Tensor:
        """The numbers of `QUERY_STATS` for given vectors, of shape (N, 8); `gate` is w . A_q, `bias` beta_b . n."""
        q, a, m = (widened(vectors[name]) for name in ("q", "a", "m"))
        h0 = centered(self._offset(q.dtype))
        numbers = [dot(q, q), dot(a, a), a @ h0, dot(a, m), m @ h0, gate, bias, self.most(m, bias)]
        return torch.stack(numbers, dim=-1)

    @staticmethod
    @torch.no_grad()
    def most(m: Tensor, bias: Tensor) -> Tensor:
        """The largest score that a query's vector m leaves any key, (N,): `bias` and, of a key of m's direction, |m|
        sqrt(d)."""
        return m.shape[-1] ** 0.5 * m.norm(dim=-1) + bias

    def score(self, query: dict[str, Tensor], key: dict[str, Tensor]) -> Tensor:
        """Scores of all pairs, of shape (queries, keys)."""
        size, eps = self.fc.out_features, self.layer_norm.eps
        q, query_a, m = (widened(query[name]) for name in ("q", "a", "m"))
        z, key_a, k = (widened(key[name]) for name in ("z", "a", "k"))
        h0 = self._offset(q.dtype)
        h0_gate, h0_square = self._gate(h0), centered(h0).square().sum()
        query_stats = widened(query["stats"]).unsqueeze(1).unbind(-1)
        q_q, query_aa, query_ah, query_am, h0_m, query_gate, bias, _ = query_stats
        z_z, key_aa, k_k, key_ah, key_ak, h0_k, key_gate = widened(key["stats"]).unbind(-1)

        x_terms = q_q + z_z
        x_square = x_terms + 2 * (q @ z.T)
        r = (x_square.clamp(min=0) / size + eps).rsqrt()
        gate = torch.tanh(r * (query_gate + key_gate) + h0_gate + self.gate_fc.bias.to(r.dtype))
        gr = gate * r

        a_terms = query_aa + key_aa
        a_square = a_terms + 2 * (query_a @ key_a.T)
        a_k = query_a @ k.T + key_ak
        a_h = query_ah + key_ah
        y_square = gr.square() * a_square + gate.square() * h0_square + k_k
        y_square = y_square + 2 * (gr * (gate * a_h + a_k) + gate * h0_k)
        numerator = gr * (m @ key_a.T + query_am) + gate * h0_m + m @ k.T
        score = numerator * (y_square.clamp(min=0) / size + eps).rsqrt() + bias

        with torch.no_grad():
            y_terms = gr.square() * a_terms + gate.square() * h0_square + k_k
            cancelled = (x_square < _CANCELLATION * x_terms) | (y_square < _CANCELLATION * y_terms)
            rows, columns = cancelled.nonzero(as_tuple=True)
        if rows.numel():
            again = [
                self.score_pairs({n: t[i] for n, t in query.items()}, {n: t[j] for n, t in key.items()})
                for i, j in zip(rows.split(_PAIRS_AT_ONCE), columns.split(_PAIRS_AT_ONCE), strict=True)
            ]
            score = score.index_put((rows, columns), torch.cat(again))
        return score

    def score_pairs(self, query: dict[str, Tensor], key: dict[str, Tensor]) -> Tensor:
        """Scores of aligned pairs, of shape (pairs,): sums are taken before their squares, so none is expanded."""
        q, query_a, m = (widened(query[name]) for name in ("q", "a", "m"))
        z, key_a, k = (widened(key[name]) for name in ("z", "a", "k"))
        query_stats, key_stats = widened(query["stats"]), widened(key["stats"])
        x, projected, gate = (
            q + z,
            query_a + key_a,
            _column(query_stats, self.QUERY_STATS, "w.A") + _column(key_stats, self.KEY_STATS, "w.A"),
        )
        x_square = dot(x, x)
        with torch.no_grad():
            # Where z~ is almost -q~, the rounding errors of A_z and A_q are large beside their sum.
            rows = (
                x_square
                < _CANCELLATION
                * (_column(query_stats, self.QUERY_STATS, "q.q") + _column(key_stats, self.KEY_STATS, "z.z"))
            ).nonzero(as_tuple=True)
        if rows[0].numel():
            again = self._project(x[rows])
            projected = projected.index_put(rows, centered(again))
            gate = gate.index_put(rows, self._gate(again))
        h0 = self._offset(x.dtype)
        r = (x_square / self.fc.out_features + self.add_layer_norm.eps).rsqrt()
        gate = torch.tanh(r * gate + self._gate(h0) + self.gate_fc.bias.to(x.dtype))
        y = gate.unsqueeze(-1) * (r.unsqueeze(-1) * projected + centered(h0)) + k
        return dot(y, m) * (y.square().mean(dim=-1) + self.layer_norm.eps).rsqrt() + _column(
            query_stats, self.QUERY_STATS, "beta.n"
        )


class VisionDualUnit(nn.Module):
    """VDLU: each side's pooled image against the other side's image tokens, with separate parameters."""

    def __init__(self, config: MimicConfig) -> None:
        super().__init__()
        self.dual_ent2men = VisionDualDirection(config)
        self.dual_men2ent = VisionDualDirection(config)

    def entity_features(self, embeds: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        return _prefixed("image_query_", self.dual_ent2men.query_features(embeds)) | _prefixed(
            "image_key_", self.dual_men2ent.key_features(embeds, tokens)
        )

    def mention_features(self, embeds: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        return _prefixed("image_query_", self.dual_men2ent.query_features(embeds)) | _prefixed(
            "image_key_", self.dual_ent2men.key_features(embeds, tokens)
        )

    def entity_stats(self, vectors: dict[str, Tensor], stats: dict[str, Tensor]) -> dict[str, Tensor]:
        """The numbers of entities whose vectors were rounded, made anew from these.

        Args:
            vectors: features of N entities, as they were rounded.
            stats: their "image_query_stats" and "image_key_stats" before.
        """
        query, key = stats["image_query_stats"], stats["image_key_stats"]
        names = VisionDualDirection.QUERY_STATS, VisionDualDirection.KEY_STATS
        kept = [_column(query, names[0], name) for name in ("w.A", "beta.n")]
        return {
            "image_query_stats": self.dual_ent2men.query_stats(without_prefix("image_query_", vectors), *kept),
            "image_key_stats": self.dual_men2ent.key_stats(
                without_prefix("image_key_", vectors), _column(key, names[1], "w.A")
            ),
        }

    def score(self, mention: dict[str, Tensor], entity: dict[str, Tensor]) -> Tensor:
        mention_query, mention_key = without_prefix("image_query_", mention), without_prefix("image_key_", mention)
        entity_query, entity_key = without_prefix("image_query_", entity), without_prefix("image_key_", entity)
        to_mention = self.dual_ent2men.score(entity_query, mention_key).T
        return (to_mention + self.dual_men2ent.score(mention_query, entity_key)) / 2

    def score_pairs(self, mention: dict[str, Tensor], entity: dict[str, Tensor]) -> Tensor:
        """Scores of aligned pairs, of shape (pairs,)."""
        mention_query, mention_key = without_prefix("image_query_", mention), without_prefix("image_key_", mention)
        entity_query, entity_key = without_prefix("image_query_", entity), without_prefix("image_key_", entity)
        to_mention = self.dual_ent2men.score_pairs(entity_query, mention_key)
        return (to_mention + self.dual_men2ent.score_pairs(mention_query, entity_key)) / 2


class CrossModalFusionUnit(nn.Module):
    """CMFU: on each side the text attends to the image, gated; the score is the dot product of the two sides."""

    def __init__(self, config: MimicConfig) -> None:
        super().__init__()
        size = config.cmfu_hidden_size
        self.text_fc = nn.Linear(config.text_embed_width, size)
        self.image_fc = nn.Linear(config.image_hidden_size, size)
        self.gate_fc = nn.Linear(size, 1)
        self.gate_layer_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)

    def features(self, text_embeds: Tensor, image_tokens: Tensor) -> dict[str, Tensor]:
        text = linear(self.text_fc, text_embeds)
        tokens = linear(self.image_fc, image_tokens)
        weights = (tokens @ text.unsqueeze(-1)).softmax(dim=1)
        context = (weights * tokens).sum(dim=1)
        gate = torch.tanh(linear(self.gate_fc, text))
        return {"cross_modal": layer_norm_in(self.gate_layer_norm, gate * text + context)}

    def score(self, mention: dict[str, Tensor], entity: dict[str, Tensor]) -> Tensor:
        return widened(mention["cross_modal"]) @ widened(entity["cross_modal"]).T

    def score_pairs(self, mention: dict[str, Tensor], entity: dict[str, Tensor]) -> Tensor:
        """Scores of aligned pairs, of shape (pairs,)."""
        return dot(widened(mention["cross_modal"]), widened(entity["cross_modal"]))


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class Matcher(nn.Module):
    """The layer norms that mentions and entities share, and the three units."""

    def __init__(self, config: MimicConfig) -> None:
        super().__init__()
        eps = config.layer_norm_eps
        self.text_cls_layernorm = nn.LayerNorm(config.text_embed_width, eps=eps)
        self.text_tokens_layernorm = nn.LayerNorm(config.text_width, eps=eps)
        self.image_cls_layernorm = nn.LayerNorm(config.image_hidden_size, eps=eps)
        self.image_tokens_layernorm = nn.LayerNorm(config.image_hidden_size, eps=eps)
        self.tglu = TextGlobalLocalUnit(config)
        self.vdlu = VisionDualUnit(config)
        self.cmfu = CrossModalFusionUnit(config)

    def _normalized(self, encoded: MimicEncoderOutput) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        device = self.text_cls_layernorm.weight.device  # the encoder may be elsewhere under a device map
        return (
            layer_norm_in(self.text_cls_layernorm, widened(encoded.text_embeds.to(device))),
            layer_norm_in(self.text_tokens_layernorm, widened(encoded.text_tokens.to(device))),
            layer_norm_in(self.image_cls_layernorm, widened(encoded.image_embeds.to(device))),
            layer_norm_in(self.image_tokens_layernorm, widened(encoded.image_tokens.to(device))),
        )

    def entity_features(self, encoded: MimicEncoderOutput, mask: Tensor) -> EntityFeatures:
        with full_precision(encoded.text_embeds.device):
            text_embeds, text_tokens, image_embeds, image_tokens = self._normalized(encoded)
            return EntityFeatures(
                self.tglu.entity_features(text_embeds, text_tokens, mask.to(text_embeds.device))
                | self.vdlu.entity_features(image_embeds, image_tokens)
                | self.cmfu.features(text_embeds, image_tokens)
            )

    def mention_features(self, encoded: MimicEncoderOutput, mask: Tensor) -> MentionFeatures:
        with full_precision(encoded.text_embeds.device):
            text_embeds, text_tokens, image_embeds, image_tokens = self._normalized(encoded)
            return MentionFeatures(
                self.tglu.mention_features(text_embeds, text_tokens, mask.to(text_embeds.device))
                | self.vdlu.mention_features(image_embeds, image_tokens)
                | self.cmfu.features(text_embeds, image_tokens)
            )

    def forward(self, mentions: MentionFeatures, entities: EntityFeatures) -> PairScores:
        mention, entity = mentions.tensors, entities.tensors
        with full_precision(mention["text_embed"].device):
            return _mean_of(*(unit.score(mention, entity) for unit in (self.tglu, self.vdlu, self.cmfu)))

    def score_pairs(
        self, mentions: MentionFeatures, entities: EntityFeatures, local: Tensor | None = None
    ) -> PairScores:
        """Scores of mention i with entity i only; the logits have the shape (pairs,). `local` as in the text unit."""
        mention, entity = mentions.tensors, entities.tensors
        with full_precision(mention["text_embed"].device):
            return _mean_of(
                self.tglu.score_pairs(mention, entity, local),
                self.vdlu.score_pairs(mention, entity),
                self.cmfu.score_pairs(mention, entity),
            )


def _mean_of(text: Tensor, image: Tensor, cross_modal: Tensor) -> PairScores:
    total = (text + image + cross_modal) / UNITS
    return PairScores(total=total, text=text, image=image, cross_modal=cross_modal)


def full_precision(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)


__all__ = [
    "HALF_UNITS",
    "UNITS",
    "CrossModalFusionUnit",
    "EntityFeatures",
    "Matcher",
    "MentionFeatures",
    "MimicEncoderOutput",
    "PairScores",
    "TextGlobalLocalUnit",
    "VisionDualDirection",
    "VisionDualUnit",
    "full_precision",
]
