"""MIMIC: a CLIP encoder for mentions and entities, and three units that score each pair of them.

The model is that of Luo et al., "Multi-Grained Multimodal Interaction Network for Entity Linking" (KDD 2023). Each unit
is written as features of the entity, features of the mention, and a score of the two, so that a knowledge base is
encoded once and a pair costs little. The scores are those of the published equations, term by term.

Shapes: M mentions, N entities, L text tokens, P image tokens (the class token and the patches).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_mimic import _HUB_KWARGS, _PIPELINE_TASK, MimicConfig

if TYPE_CHECKING:
    # Not needed here. They are named because older versions of transformers, loading the code of a checkpoint from a
    # directory, bring what this file imports and not what that imports in its turn.
    from .card_mimic import _index_card  # noqa: F401
    from .first_stage_mimic import FirstStage  # noqa: F401
    from .index_mimic import EntityIndex  # noqa: F401
    from .processing_mimic import MimicProcessor  # noqa: F401
    from .search_mimic import Searcher  # noqa: F401
    from .store_mimic import EntityIndexError  # noqa: F401

# Expanded squares lose digits where the terms of a sum nearly cancel. Where a square is below this fraction of its
# terms, the pair is computed again without the expansion (see `_DualUnit`); above it, errors grow tenfold at most.
_CANCELLATION = 0.1
_PAIRS_AT_ONCE = 2**15
# What a CPU's cache holds is twice as fast as what it does not; a GPU wants more at a time.
_SCORE_BLOCK_BYTES, _SCORE_BLOCK_BYTES_GPU = 16 * 2**20, 256 * 2**20
_SCORE_BLOCK_MENTIONS = 32


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
class MimicOutput(ModelOutput):
    """Scores of all pairs of a batch.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): the contrastive loss, where it was asked for.
        logits (`torch.Tensor` of shape `(M, N)`, float32): the total score, mean of the three below.
        text_logits (`torch.Tensor` of shape `(M, N)`, float32): score of the text unit (TGLU).
        image_logits (`torch.Tensor` of shape `(M, N)`, float32): score of the image unit (VDLU).
        cross_modal_logits (`torch.Tensor` of shape `(M, N)`, float32): score of the cross-modal unit (CMFU).
    """

    loss: Tensor | None = None
    logits: Tensor = None  # type: ignore[assignment]
    text_logits: Tensor = None  # type: ignore[assignment]
    image_logits: Tensor = None  # type: ignore[assignment]
    cross_modal_logits: Tensor = None  # type: ignore[assignment]


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


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, layer.weight.to(x.dtype), bias)


def _layer_norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, layer.normalized_shape, layer.weight.to(x.dtype), layer.bias.to(x.dtype), layer.eps)


def _centred(x: Tensor) -> Tensor:
    x = x - x.mean(dim=-1, keepdim=True)
    return x - x.mean(dim=-1, keepdim=True)  # the rounding error of a large mean


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dim=-1)


class _TextUnit(nn.Module):
    """TGLU: the dot product of the pooled texts, and an attention of the entity's tokens over the mention's.

    The attention's part is `<e, LN(c)>` with `e = fc_cls(t_e)` and `c` the mean over the entity's tokens of the
    attended values. With `p` the mean attention weight of each mention token, `c = p U`, and a layer norm ignores the
    mean of what it normalises, so only the centred rows of U and the centred `gamma * e` are needed.
    """

    def __init__(self, config: MimicConfig) -> None:
        super().__init__()
        backbone: Any = config.backbone_config
        size = config.tglu_hidden_size
        self.mask_padding = config.mask_text_padding
        self.fc_query = nn.Linear(backbone.text_config.hidden_size, size)
        self.fc_key = nn.Linear(backbone.text_config.hidden_size, size)
        self.fc_value = nn.Linear(backbone.text_config.hidden_size, size)
        self.fc_cls = nn.Linear(backbone.projection_dim, size)
        self.layer_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)

    def entity_features(self, embeds: Tensor, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        local = _linear(self.fc_cls, embeds)
        queries = _linear(self.fc_query, tokens) * self.fc_query.out_features**-0.5
        features = {
            "text_embed": embeds,
            "text_query": queries,
            "text_local": _centred(self.layer_norm.weight.to(local.dtype) * local),
            "text_bias": local @ self.layer_norm.bias.to(local.dtype),
        }
        if self.mask_padding:
            features["text_mask"] = mask.bool()
        return features

    def mention_features(self, embeds: Tensor, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        features = {
            "text_embed": embeds,
            "text_key": _linear(self.fc_key, tokens),
            "text_value": _centred(_linear(self.fc_value, tokens)),
        }
        if self.mask_padding:
            features["text_mask"] = mask.bool()
        return features

    def attention(self, mention: dict[str, Tensor], entity: dict[str, Tensor]) -> Tensor:
        """Mean over the entity's tokens of the attention over the mention's, of shape (M, N, L)."""
        queries, keys = _wide(entity["text_query"]), _wide(mention["text_key"])
        # (N, L, M, L): one matrix product for all pairs is nearly twice as fast as one for each mention.
        logits = (queries.flatten(0, 1) @ keys.flatten(0, 1).T).view(*queries.shape[:2], *keys.shape[:2])
        if not self.mask_padding:
            return logits.softmax(dim=-1).mean(dim=1).transpose(0, 1)
        logits = logits.masked_fill(~mention["text_mask"], -torch.inf)
        query_mask = entity["text_mask"].to(logits.dtype)[:, :, None, None]
        return ((logits.softmax(dim=-1) * query_mask).sum(dim=1) / query_mask.sum(dim=1)).transpose(0, 1)

    def local_score(self, mention: dict[str, Tensor], entity: dict[str, Tensor], attention: Tensor) -> Tensor:
        """`<e, LN(c)>` of shape (M, N), from the attention."""
        context = attention @ _wide(mention["text_value"])
        length = (context.square().mean(dim=-1) + self.layer_norm.eps).rsqrt()
        return _dot(context, _wide(entity["text_local"])) * length + entity["text_bias"]

    def global_score(self, mention: dict[str, Tensor], entity: dict[str, Tensor]) -> Tensor:
        return _wide(mention["text_embed"]) @ _wide(entity["text_embed"]).T

    def score(self, mention: dict[str, Tensor], entity: dict[str, Tensor]) -> Tensor:
        local = self.local_score(mention, entity, self.attention(mention, entity))
        return (self.global_score(mention, entity) + local) / 2

    def local_pairs(self, mention: dict[str, Tensor], entity: dict[str, Tensor]) -> Tensor:
        """`<e, LN(c)>` of each of G mentions with W entities of its own, (G, W); the entities' tensors are (G, W, ...).

        A mention's keys serve all of its entities: copying them for each pair would take longer than the attention.
        """
        queries, keys = _wide(entity["text_query"]), _wide(mention["text_key"])
        logits = queries.flatten(1, 2) @ keys.transpose(1, 2)
        if self.mask_padding:
            logits = logits.masked_fill(~mention["text_mask"].unsqueeze(1), -torch.inf)
        weights = logits.softmax(dim=-1).unflatten(1, queries.shape[1:3])
        if self.mask_padding:
            query_mask = entity["text_mask"].to(weights.dtype).unsqueeze(-1)
            attention = (weights * query_mask).sum(dim=2) / query_mask.sum(dim=2)
        else:
            attention = weights.mean(dim=2)
        context = attention @ _wide(mention["text_value"])
        length = (context.square().mean(dim=-1) + self.layer_norm.eps).rsqrt()
        return _dot(context, _wide(entity["text_local"])) * length + entity["text_bias"]

    def score_pairs(self, mention: dict[str, Tensor], entity: dict[str, Tensor], local: Tensor | None = None) -> Tensor:
        """Scores of aligned pairs, of shape (pairs,); `local` are their [`local_pairs`], if these are known."""
        if local is None:
            local = self.local_pairs(mention, {name: tensor.unsqueeze(1) for name, tensor in entity.items()})[:, 0]
        return (_dot(_wide(mention["text_embed"]), _wide(entity["text_embed"])) + local) / 2


class _DualUnit(nn.Module):
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
        return _linear(self.fc, self.add_layer_norm.bias.to(dtype))

    def _gate(self, x: Tensor) -> Tensor:
        """`w . x`, without the bias."""
        return x @ self.gate_fc.weight[0].to(x.dtype)

    def key_features(self, embeds: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """`z`: z~; `a`: A_z~; `k`: k~; and the numbers of `KEY_STATS`."""
        z = _centred(_linear(self.tokens_fc, tokens.mean(dim=1)))
        projected = self._project(z)
        vectors = {"z": z, "a": _centred(projected), "k": _centred(_linear(self.cls_fc, embeds))}
        return {**vectors, "stats": self.key_stats(vectors, self._gate(projected))}

    def key_stats(self, vectors: dict[str, Tensor], gate: Tensor) -> Tensor:
        """The numbers of `KEY_STATS` for given vectors, of shape (N, 7); `gate` is w . A_z."""
        z, a, k = (_wide(vectors[name]) for name in ("z", "a", "k"))
        h0 = _centred(self._offset(z.dtype))
        return torch.stack([_dot(z, z), _dot(a, a), _dot(k, k), a @ h0, _dot(a, k), k @ h0, gate], dim=-1)

    def query_features(self, embeds: Tensor) -> dict[str, Tensor]:
        """`q`: q~; `a`: A_q~; `m`: (gamma_b * n)~ with n = LNb(q'); and the numbers of `QUERY_STATS`."""
        query = _linear(self.cls_fc, embeds)
        q = _centred(query)
        projected = self._project(q)
        n = _layer_norm(self.layer_norm, query)
        m = _centred(self.layer_norm.weight.to(n.dtype) * n)
        vectors = {"q": q, "a": _centred(projected), "m": m}
        bias = n @ self.layer_norm.bias.to(n.dtype)
        return {**vectors, "stats": self.query_stats(vectors, self._gate(projected), bias)}

    def query_stats(self, vectors: dict[str, Tensor], gate: Tensor, bias: Tensor) -> Tensor:
        """The numbers of `QUERY_STATS` for given vectors, of shape (N, 8); `gate` is w . A_q, `bias` beta_b . n."""
        q, a, m = (_wide(vectors[name]) for name in ("q", "a", "m"))
        h0 = _centred(self._offset(q.dtype))
        numbers = [_dot(q, q), _dot(a, a), a @ h0, _dot(a, m), m @ h0, gate, bias, self.most(m, bias)]
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
        q, query_a, m = (_wide(query[name]) for name in ("q", "a", "m"))
        z, key_a, k = (_wide(key[name]) for name in ("z", "a", "k"))
        h0 = self._offset(q.dtype)
        h0_gate, h0_square = self._gate(h0), _centred(h0).square().sum()
        query_stats = _wide(query["stats"]).unsqueeze(1).unbind(-1)
        q_q, query_aa, query_ah, query_am, h0_m, query_gate, bias, _ = query_stats
        z_z, key_aa, k_k, key_ah, key_ak, h0_k, key_gate = _wide(key["stats"]).unbind(-1)

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
        q, query_a, m = (_wide(query[name]) for name in ("q", "a", "m"))
        z, key_a, k = (_wide(key[name]) for name in ("z", "a", "k"))
        query_stats, key_stats = _wide(query["stats"]), _wide(key["stats"])
        x, projected, gate = q + z, query_a + key_a, query_stats[:, 5] + key_stats[:, 6]
        x_square = _dot(x, x)
        with torch.no_grad():
            # Where z~ is almost -q~, the rounding errors of A_z and A_q are large beside their sum.
            rows = (x_square < _CANCELLATION * (query_stats[:, 0] + key_stats[:, 0])).nonzero(as_tuple=True)
        if rows[0].numel():
            again = self._project(x[rows])
            projected = projected.index_put(rows, _centred(again))
            gate = gate.index_put(rows, self._gate(again))
        h0 = self._offset(x.dtype)
        r = (x_square / self.fc.out_features + self.add_layer_norm.eps).rsqrt()
        gate = torch.tanh(r * gate + self._gate(h0) + self.gate_fc.bias.to(x.dtype))
        y = gate.unsqueeze(-1) * (r.unsqueeze(-1) * projected + _centred(h0)) + k
        return _dot(y, m) * (y.square().mean(dim=-1) + self.layer_norm.eps).rsqrt() + query_stats[:, 6]


class _ImageUnit(nn.Module):
    """VDLU: each side's pooled image against the other side's image tokens, with separate parameters."""

    def __init__(self, config: MimicConfig) -> None:
        super().__init__()
        self.dual_ent2men = _DualUnit(config)
        self.dual_men2ent = _DualUnit(config)

    def entity_features(self, embeds: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        return _prefixed("image_query_", self.dual_ent2men.query_features(embeds)) | _prefixed(
            "image_key_", self.dual_men2ent.key_features(embeds, tokens)
        )

    def mention_features(self, embeds: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        return _prefixed("image_query_", self.dual_men2ent.query_features(embeds)) | _prefixed(
            "image_key_", self.dual_ent2men.key_features(embeds, tokens)
        )

    def score(self, mention: dict[str, Tensor], entity: dict[str, Tensor]) -> Tensor:
        mention_query, mention_key = _with_prefix("image_query_", mention), _with_prefix("image_key_", mention)
        entity_query, entity_key = _with_prefix("image_query_", entity), _with_prefix("image_key_", entity)
        to_mention = self.dual_ent2men.score(entity_query, mention_key).T
        return (to_mention + self.dual_men2ent.score(mention_query, entity_key)) / 2

    def score_pairs(self, mention: dict[str, Tensor], entity: dict[str, Tensor]) -> Tensor:
        """Scores of aligned pairs, of shape (pairs,)."""
        mention_query, mention_key = _with_prefix("image_query_", mention), _with_prefix("image_key_", mention)
        entity_query, entity_key = _with_prefix("image_query_", entity), _with_prefix("image_key_", entity)
        to_mention = self.dual_ent2men.score_pairs(entity_query, mention_key)
        return (to_mention + self.dual_men2ent.score_pairs(mention_query, entity_key)) / 2


class _CrossModalUnit(nn.Module):
    """CMFU: on each side the text attends to the image, gated; the score is the dot product of the two sides."""

    def __init__(self, config: MimicConfig) -> None:
        super().__init__()
        backbone: Any = config.backbone_config
        size = config.cmfu_hidden_size
        self.text_fc = nn.Linear(backbone.projection_dim, size)
        self.image_fc = nn.Linear(config.image_hidden_size, size)
        self.gate_fc = nn.Linear(size, 1)
        self.gate_layer_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)

    def features(self, text_embeds: Tensor, image_tokens: Tensor) -> dict[str, Tensor]:
        text = _linear(self.text_fc, text_embeds)
        tokens = _linear(self.image_fc, image_tokens)
        weights = (tokens @ text.unsqueeze(-1)).softmax(dim=1)
        context = (weights * tokens).sum(dim=1)
        gate = torch.tanh(_linear(self.gate_fc, text))
        return {"cross_modal": _layer_norm(self.gate_layer_norm, gate * text + context)}

    def score(self, mention: dict[str, Tensor], entity: dict[str, Tensor]) -> Tensor:
        return _wide(mention["cross_modal"]) @ _wide(entity["cross_modal"]).T

    def score_pairs(self, mention: dict[str, Tensor], entity: dict[str, Tensor]) -> Tensor:
        """Scores of aligned pairs, of shape (pairs,)."""
        return _dot(_wide(mention["cross_modal"]), _wide(entity["cross_modal"]))


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class _Encoder(nn.Module):
    """CLIP, with its image features projected to the units' width. The same for mentions and entities."""

    def __init__(self, config: MimicConfig) -> None:
        super().__init__()
        backbone: Any = config.backbone_config
        self.mask_padding = config.mask_text_padding
        self.clip = CLIPModel._from_config(backbone)
        self.image_cls_fc = nn.Linear(backbone.projection_dim, config.image_hidden_size)
        self.image_tokens_fc = nn.Linear(backbone.vision_config.hidden_size, config.image_hidden_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> MimicEncoderOutput:
        text_pooled, text_tokens = self._encode_texts(input_ids, attention_mask)
        image_embeds, image_tokens = self._encode_images(pixel_values)
        return MimicEncoderOutput(
            text_embeds=F.normalize(self.clip.text_projection(text_pooled), dim=-1),
            text_tokens=text_tokens,
            image_embeds=image_embeds,
            image_tokens=image_tokens,
        )

    def _encode_texts(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        length = input_ids.shape[1]
        leave_out = self.mask_padding and not torch.is_grad_enabled()
        kept = self._longest(input_ids, attention_mask) if leave_out else length
        text = self.clip.text_model(input_ids=input_ids[:, :kept], attention_mask=attention_mask[:, :kept])
        tokens = text.last_hidden_state
        if leave_out:
            # No score depends on padding: zeros, so that features do not depend on the rest of the batch either.
            tokens = tokens.masked_fill(~attention_mask[:, :kept, None].bool(), 0)
            tokens = F.pad(tokens, (0, 0, 0, length - kept))
        return text.pooler_output, tokens

    def _longest(self, input_ids: Tensor, attention_mask: Tensor) -> int:
        """How many columns hold all texts' tokens, and the end-of-text tokens where CLIP pools them."""
        eos: Any = self.clip.config.text_config.eos_token_id
        ends = input_ids if eos == 2 else (input_ids == eos).int()  # 2 is a mistake of old configurations
        columns = attention_mask.bool().any(dim=0)
        columns[ends.argmax(dim=1)] = True
        return int(columns.nonzero().max()) + 1

    def _encode_images(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        rows = None
        if not torch.is_grad_enabled():
            # Whatever has no picture has the same blank one, which is encoded once.
            blank = ~pixel_values.flatten(1).any(dim=1)
            if int(blank.sum()) > 1:
                shown = (~blank).nonzero().squeeze(1)
                rows = torch.zeros(len(blank), dtype=torch.long, device=blank.device)
                rows[shown] = torch.arange(1, len(shown) + 1, device=blank.device)
                pixel_values = torch.cat([pixel_values[blank][:1], pixel_values[shown]])
        image = self.clip.vision_model(pixel_values=pixel_values)
        embeds = self.image_cls_fc(F.normalize(self.clip.visual_projection(image.pooler_output), dim=-1))
        tokens = self.image_tokens_fc(image.last_hidden_state)
        return (embeds, tokens) if rows is None else (embeds[rows], tokens[rows])


class _Matcher(nn.Module):
    """The layer norms that mentions and entities share, and the three units."""

    def __init__(self, config: MimicConfig) -> None:
        super().__init__()
        backbone: Any = config.backbone_config
        eps = config.layer_norm_eps
        self.text_cls_layernorm = nn.LayerNorm(backbone.projection_dim, eps=eps)
        self.text_tokens_layernorm = nn.LayerNorm(backbone.text_config.hidden_size, eps=eps)
        self.image_cls_layernorm = nn.LayerNorm(config.image_hidden_size, eps=eps)
        self.image_tokens_layernorm = nn.LayerNorm(config.image_hidden_size, eps=eps)
        self.tglu = _TextUnit(config)
        self.vdlu = _ImageUnit(config)
        self.cmfu = _CrossModalUnit(config)

    def _normalised(self, encoded: MimicEncoderOutput) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        device = self.text_cls_layernorm.weight.device  # the encoder may be elsewhere under a device map
        return (
            _layer_norm(self.text_cls_layernorm, _wide(encoded.text_embeds.to(device))),
            _layer_norm(self.text_tokens_layernorm, _wide(encoded.text_tokens.to(device))),
            _layer_norm(self.image_cls_layernorm, _wide(encoded.image_embeds.to(device))),
            _layer_norm(self.image_tokens_layernorm, _wide(encoded.image_tokens.to(device))),
        )

    def entity_features(self, encoded: MimicEncoderOutput, mask: Tensor) -> EntityFeatures:
        with _full_precision(encoded.text_embeds.device):
            text_embeds, text_tokens, image_embeds, image_tokens = self._normalised(encoded)
            return EntityFeatures(
                self.tglu.entity_features(text_embeds, text_tokens, mask.to(text_embeds.device))
                | self.vdlu.entity_features(image_embeds, image_tokens)
                | self.cmfu.features(text_embeds, image_tokens)
            )

    def mention_features(self, encoded: MimicEncoderOutput, mask: Tensor) -> MentionFeatures:
        with _full_precision(encoded.text_embeds.device):
            text_embeds, text_tokens, image_embeds, image_tokens = self._normalised(encoded)
            return MentionFeatures(
                self.tglu.mention_features(text_embeds, text_tokens, mask.to(text_embeds.device))
                | self.vdlu.mention_features(image_embeds, image_tokens)
                | self.cmfu.features(text_embeds, image_tokens)
            )

    def forward(self, mentions: MentionFeatures, entities: EntityFeatures) -> MimicOutput:
        mention, entity = mentions.tensors, entities.tensors
        with _full_precision(mention["text_embed"].device):
            return _output(*(unit.score(mention, entity) for unit in (self.tglu, self.vdlu, self.cmfu)))

    def score_pairs(
        self, mentions: MentionFeatures, entities: EntityFeatures, local: Tensor | None = None
    ) -> MimicOutput:
        """Scores of mention i with entity i only; the logits have the shape (pairs,). `local` as in the text unit."""
        mention, entity = mentions.tensors, entities.tensors
        with _full_precision(mention["text_embed"].device):
            return _output(
                self.tglu.score_pairs(mention, entity, local),
                self.vdlu.score_pairs(mention, entity),
                self.cmfu.score_pairs(mention, entity),
            )


def _output(text: Tensor, image: Tensor, cross_modal: Tensor) -> MimicOutput:
    logits = (text + image + cross_modal) / 3
    return MimicOutput(logits=logits, text_logits=text, image_logits=image, cross_modal_logits=cross_modal)


def _full_precision(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)


class MimicPreTrainedModel(PreTrainedModel):
    """Weight initialisation, loading and saving of MIMIC models."""

    config_class = MimicConfig
    base_model_prefix = "mimic"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _no_split_modules = ["CLIPTextEmbeddings", "CLIPEncoderLayer", "CLIPVisionEmbeddings", "_Matcher"]  # noqa: RUF012
    # Small beside the encoder, and its arithmetic is float32 whatever the encoder's is.
    _keep_in_fp32_modules_strict = ["matcher"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # The loss is a mean over the batch, not over a number of items that the Trainer could pass.
    accepts_loss_kwargs = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The published model's own layers start from PyTorch's default (CLIP's are initialised by CLIP).
        if isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.in_features**-0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class MimicModel(MimicPreTrainedModel):
    """MIMIC: scores how well each entity fits each mention.

    Args:
        config ([`MimicConfig`]): the configuration; the weights are random until loaded.

    Example:

    ```python
    >>> from transformers import AutoModel, AutoProcessor

    >>> model = AutoModel.from_pretrained(path, trust_remote_code=True)
    >>> processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
    >>> mentions = model.encode_mentions(**processor.process_mentions(["Orange"], ["Orange opened a shop."], [photo]))
    >>> entities = model.encode_entities(**processor.process_entities(names, descriptions, images))
    >>> model.score(mentions, entities).logits.argmax(dim=-1)
    ```
    """

    _auto_class = "AutoModel"

    def __init__(self, config: MimicConfig) -> None:
        super().__init__(config)
        self.encoder = _Encoder(config)
        self.matcher = _Matcher(config)
        self.post_init()

    @classmethod
    def from_backbone(cls, backbone: str | os.PathLike[str] | CLIPModel, **kwargs: Any) -> MimicModel:
        """A MIMIC model on a pretrained CLIP, its own layers initialised at random: where fine-tuning starts.

        Args:
            backbone: Hub id or directory of a CLIP checkpoint, or a `CLIPModel` (whose weights are then shared).
            **kwargs: what finds the checkpoint (`revision`, `cache_dir`, `token`, `local_files_only`,
                `force_download`, `subfolder`); `dtype` and `attn_implementation`, for the backbone; and everything
                that `MimicConfig` takes.

        Raises:
            ValueError: if the checkpoint is not a CLIP model, or the configuration does not fit it.
        """
        hub_kwargs = {key: kwargs.pop(key) for key in _HUB_KWARGS if key in kwargs}
        model_kwargs = {key: kwargs.pop(key) for key in ("dtype", "attn_implementation") if key in kwargs}
        if isinstance(backbone, CLIPModel):
            clip = backbone
            config = MimicConfig(backbone_config=clip.config, **kwargs)
        else:
            config = MimicConfig.from_backbone(backbone, **hub_kwargs, **kwargs)
            clip = CLIPModel.from_pretrained(backbone, **hub_kwargs, **model_kwargs)
            config.backbone_config = clip.config
        model = cls(config)
        model.encoder.clip = clip
        for layer in (model.encoder.image_cls_fc, model.encoder.image_tokens_fc):
            layer.to(clip.dtype)
        return model

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.clip.text_model.embeddings.token_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.clip.text_model.embeddings.token_embedding = value

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, pixel_values: Tensor | None = None
    ) -> MimicEncoderOutput:
        """Encodes texts and pictures of mentions or entities, before anything is specific to either.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`): the tokens, L at most the backbone's positions.
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 1 for tokens, 0 for padding.
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`, *optional*): the pictures; zeros where there is none.

        Raises:
            ValueError: if the shapes do not fit each other.
        """
        input_ids, attention_mask, pixel_values = self._checked(input_ids, attention_mask, pixel_values, "")
        return self.encoder(input_ids, attention_mask, pixel_values)

    def encode_mentions(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, pixel_values: Tensor | None = None
    ) -> MentionFeatures:
        """Features of M mentions, to be scored against any entities. Arguments as of [`~MimicModel.encode`]."""
        input_ids, attention_mask, pixel_values = self._checked(input_ids, attention_mask, pixel_values, "")
        return self.matcher.mention_features(self.encoder(input_ids, attention_mask, pixel_values), attention_mask)

    def encode_entities(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, pixel_values: Tensor | None = None
    ) -> EntityFeatures:
        """Features of N entities, to be scored against any mentions. Arguments as of [`~MimicModel.encode`]."""
        input_ids, attention_mask, pixel_values = self._checked(input_ids, attention_mask, pixel_values, "entity_")
        return self.matcher.entity_features(self.encoder(input_ids, attention_mask, pixel_values), attention_mask)

    def _checked(
        self, input_ids: Tensor, attention_mask: Tensor | None, pixel_values: Tensor | None, prefix: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        if input_ids.dim() != 2 or input_ids.shape[0] == 0:
            raise ValueError(
                f"`{prefix}input_ids` must have the shape (batch, tokens), at least one row; got "
                f"{tuple(input_ids.shape)}."
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"`{prefix}attention_mask` has the shape {tuple(attention_mask.shape)}, `{prefix}input_ids` "
                f"{tuple(input_ids.shape)}: they must be equal."
            )
        vision: Any = self.config.backbone_config.vision_config
        shape = (input_ids.shape[0], vision.num_channels, vision.image_size, vision.image_size)
        if pixel_values is None:
            dtype = self.encoder.image_tokens_fc.weight.dtype
            pixel_values = torch.zeros(shape, dtype=dtype, device=input_ids.device)
        if tuple(pixel_values.shape) != shape:
            raise ValueError(
                f"`{prefix}pixel_values` has the shape {tuple(pixel_values.shape)}, but this model and "
                f"{shape[0]} texts need {shape}."
            )
        return input_ids, attention_mask, pixel_values

    def score(self, mentions: MentionFeatures, entities: EntityFeatures, block_bytes: int | None = None) -> MimicOutput:
        """Scores each of M mentions against each of N entities.

        Args:
            mentions ([`MentionFeatures`]): from [`~MimicModel.encode_mentions`].
            entities ([`EntityFeatures`]): from [`~MimicModel.encode_entities`].
            block_bytes (`int`, *optional*): memory, in bytes, that the largest intermediate tensor may take; 16 MiB on
                a CPU, 256 MiB elsewhere, unless told. Pairs are scored in blocks of that size, so peak memory grows
                with the block and the output, not with M x N x L x L.

        Returns:
            [`MimicOutput`] without a loss; its tensors are float32 of shape (M, N).

        Raises:
            TypeError: if the arguments are swapped, or not features.
        """
        if getattr(mentions, "side", None) != "mention" or getattr(entities, "side", None) != "entity":
            raise TypeError(
                "MimicModel.score takes MentionFeatures (from encode_mentions) and EntityFeatures (from "
                f"encode_entities), got {type(mentions).__name__} and {type(entities).__name__}."
            )
        if block_bytes is None:
            on_cpu = mentions.tensors["text_key"].device.type == "cpu"
            block_bytes = _SCORE_BLOCK_BYTES if on_cpu else _SCORE_BLOCK_BYTES_GPU
        shape = (len(mentions), len(entities))
        whole: dict[str, Tensor] = {}
        if 0 in shape:
            names = ("logits", "text_logits", "image_logits", "cross_modal_logits")
            whole = {name: _wide(mentions.tensors["text_embed"]).new_empty(shape) for name in names}
        for rows, column_blocks in _pair_blocks(mentions, entities, block_bytes):
            for columns in column_blocks:
                part = self.matcher(mentions[rows], entities[columns])
                if part.logits.shape == shape:
                    return part
                # Into one place: kept one by one, they would scatter what the blocks leave free of the memory.
                for name, scores in part.items():
                    if name not in whole:
                        whole[name] = scores.new_empty(shape)
                    whole[name][rows, columns] = scores
        return MimicOutput(**whole)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        entity_input_ids: Tensor | None = None,
        entity_attention_mask: Tensor | None = None,
        entity_pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        entity_labels: Tensor | None = None,
        return_loss: bool | None = None,
        return_dict: bool | None = None,
    ) -> MimicOutput | tuple[Tensor, ...]:
        """Encodes M mentions and N entities and scores all pairs.

        Args:
            input_ids (`torch.LongTensor` of shape `(M, L)`): tokens of the mentions.
            attention_mask (`torch.Tensor` of shape `(M, L)`, *optional*): 1 for tokens, 0 for padding.
            pixel_values (`torch.Tensor` of shape `(M, 3, H, W)`, *optional*): pictures; zeros where there is none.
            entity_input_ids (`torch.LongTensor` of shape `(N, L)`): tokens of the entities.
            entity_attention_mask (`torch.Tensor` of shape `(N, L)`, *optional*): 1 for tokens, 0 for padding.
            entity_pixel_values (`torch.Tensor` of shape `(N, 3, H, W)`, *optional*): pictures of the entities.
            labels (`torch.LongTensor` of shape `(M,)`, *optional*): for the loss, the row of each mention's answer
                among the entities. Defaults to the entity in the mention's own row, which needs M = N.
            entity_labels (`torch.LongTensor` of shape `(N,)`, *optional*): equal numbers mark the same entity. Used
                if the configuration says `ignore_duplicate_answers`.
            return_loss (`bool`, *optional*): whether to return the loss. By default, if `labels` are given.
            return_dict (`bool`, *optional*): whether to return a [`MimicOutput`] or a tuple.

        Raises:
            ValueError: if the shapes do not fit each other.
        """
        if entity_input_ids is None:
            raise ValueError(
                "MimicModel scores mentions against entities and was given no `entity_input_ids`. To encode mentions "
                "alone, call `encode_mentions`."
            )
        mentions = self.encode_mentions(input_ids, attention_mask, pixel_values)
        entities = self.encode_entities(entity_input_ids, entity_attention_mask, entity_pixel_values)
        output = self.score(mentions, entities)
        if return_loss or (return_loss is None and labels is not None):
            output = MimicOutput(loss=self.contrastive_loss(output, labels, entity_labels), **output)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def contrastive_loss(
        self, output: MimicOutput, labels: Tensor | None = None, entity_labels: Tensor | None = None
    ) -> Tensor:
        """The sum of the cross-entropies of the total score and of each unit's, each mention's answer against the
        other entities of the batch (section 4.5 of the paper).

        Args:
            output: scores of shape (M, N).
            labels, entity_labels: as in [`~MimicModel.forward`].

        Returns:
            `torch.Tensor` of shape `()`, float32.
        """
        count, entity_count = output.logits.shape
        device = output.logits.device
        if labels is None:
            if count != entity_count:
                raise ValueError(
                    f"The loss of {count} mentions against {entity_count} entities needs `labels`: the row of each "
                    "mention's answer among the entities."
                )
            labels = torch.arange(count, device=device)
        labels = labels.to(device)
        if labels.shape != (count,) or (count and not 0 <= int(labels.min()) <= int(labels.max()) < entity_count):
            raise ValueError(
                f"`labels` must hold {count} rows of entities, each from 0 to {entity_count - 1}; got the shape "
                f"{tuple(labels.shape)} and values from {int(labels.min())} to {int(labels.max())}."
            )
        own = torch.arange(count, device=device)
        not_rivals = not_rival_mentions = None
        if self.config.ignore_duplicate_answers and entity_labels is not None:
            if entity_labels.shape != (entity_count,):
                raise ValueError(
                    f"`entity_labels` must hold a number for each of {entity_count} entities; got the shape "
                    f"{tuple(entity_labels.shape)}."
                )
            entity_labels = entity_labels.to(device)
            answers = entity_labels[labels].unsqueeze(1)
            not_rivals = (answers == entity_labels).index_put((own, labels), own.new_zeros(()).bool())
            not_rival_mentions = (answers == answers.T).fill_diagonal_(False)
        loss = output.logits.new_zeros(())
        for logits in (output.logits, output.text_logits, output.image_logits, output.cross_modal_logits):
            scores = logits if not_rivals is None else logits.masked_fill(not_rivals, -torch.inf)
            loss = loss + F.cross_entropy(scores, labels)
            if self.config.symmetric_loss:
                reverse = logits[:, labels].T  # each mention's answer against all mentions
                if not_rival_mentions is not None:
                    reverse = reverse.masked_fill(not_rival_mentions, -torch.inf)
                loss = loss + F.cross_entropy(reverse, own)
        return loss

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Saves weights, configuration and the code that `trust_remote_code=True` loads, the pipeline's too."""
        # Inside the method, since that module imports this one. That there is such an import at all also tells
        # transformers that the pipeline's code belongs to the model's.
        from .pipeline_mimic import MultimodalEntityLinkingPipeline as Pipeline

        self.config.custom_pipelines = {
            _PIPELINE_TASK: {
                "impl": f"{Pipeline.__module__.rpartition('.')[2]}.{Pipeline.__name__}",
                "pt": ["AutoModel"],
                "type": "multimodal",
            }
        }
        super().save_pretrained(save_directory, *args, **kwargs)


def _pair_blocks(
    mentions: MentionFeatures, entities: EntityFeatures, block_bytes: int
) -> Iterator[tuple[slice, list[slice]]]:
    """Cuts M x N pairs into blocks whose attention matrix takes at most `block_bytes` (one pair at least)."""
    per_pair = 4 * mentions.tensors["text_key"].shape[1] * entities.tensors["text_query"].shape[1]
    pairs = max(1, block_bytes // per_pair)
    # Some mentions at a time, so that what is read of an entity serves them all.
    columns = max(1, min(len(entities), pairs // max(1, min(len(mentions), _SCORE_BLOCK_MENTIONS))))
    rows = max(1, pairs // columns)
    for start in range(0, len(mentions), rows):
        yield slice(start, start + rows), [slice(i, i + columns) for i in range(0, len(entities), columns)]


__all__ = ["EntityFeatures", "MentionFeatures", "MimicEncoderOutput", "MimicModel", "MimicOutput"]
