"""The three units that score a pair of a mention and an entity: their features of each side, and the pair's score.

The model is that of Luo et al., "Multi-Grained Multimodal Interaction Network for Entity Linking" (KDD 2023). Each
unit is split into features of the entity, features of the mention, and a score of the two. So a knowledge base is
encoded once, and a pair costs little. The scores are those of the published equations, term by term.

A unit is called with features of mentions and of entities, and scores all pairs. It calls its layers for everything
that it needs of them (see layers_mimic).

Shapes: M mentions, N entities, L text tokens, P image tokens (the class token and the patches).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .configuration_mimic import MimicConfig
from .features_mimic import add_prefix, pick_prefix
from .layers_mimic import (
    UnitLayerNorm,
    UnitLinear,
    at_least_float32,
    called,
    centered,
    dot,
    is_traced,
    linear_part,
    offset,
    scaled,
)

# Expanded squares lose digits where the terms of a sum nearly cancel. Where a square is below this fraction of its
# terms, the pair is computed again without the expansion (see `VisionDualDirection`); above it, errors grow tenfold at
# most.
_CANCELLATION = 0.1
_PAIRS_AT_ONCE = 2**15


class TextGlobalLocalUnit(nn.Module):
    """TGLU: the dot product of the pooled texts, and an attention of the entity's tokens over the mention's.

    The attention's part is `<e, LN(c)>` with `e = fc_cls(t_e)` and `c` the mean over the entity's tokens of the
    attended values. With `p` the mean attention weight of each mention token, `c = p U`, and a layer norm ignores the
    mean of what it normalizes, so only the centerd rows of U and the centerd `gamma * e` are needed.
    """

    def __init__(self, config: MimicConfig) -> None:
        super().__init__()
        size = config.tglu_hidden_size
        self.mask_padding = config.mask_text_padding
        self.scale = size**-0.5
        self.eps = config.layer_norm_eps
        self.fc_query = UnitLinear(config.text_width, size)
        self.fc_key = UnitLinear(config.text_width, size)
        self.fc_value = UnitLinear(config.text_width, size)
        self.fc_cls = UnitLinear(config.text_embed_width, size)
        self.layer_norm = UnitLayerNorm(size, eps=config.layer_norm_eps)

    def entity_features(self, embeds: Tensor, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        queries = self.fc_query(tokens) * self.scale
        features = {"text_embed": embeds, "text_query": queries, **self.local_features(embeds)}
        if self.mask_padding:
            features["text_mask"] = mask.bool()
        return features

    def local_features(self, embeds: Tensor) -> dict[str, Tensor]:
        """What the attention's part needs of the pooled texts of entities, (N, projection_dim)."""
        local = self.fc_cls(embeds)
        return {
            "text_local": centered(scaled(self.layer_norm, local)),
            "text_bias": local @ offset(self.layer_norm, local),
        }

    def mention_features(self, embeds: Tensor, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        features = {
            "text_embed": embeds,
            "text_key": self.fc_key(tokens),
            "text_value": centered(self.fc_value(tokens)),
        }
        if self.mask_padding:
            features["text_mask"] = mask.bool()
        return features

    def attention(self, mention: dict[str, Tensor], entity: dict[str, Tensor]) -> Tensor:
        """Mean over the entity's tokens of the attention over the mention's, of shape (M, N, L)."""
        queries, keys = at_least_float32(entity["text_query"]), at_least_float32(mention["text_key"])
        # (N, L, M, L): one matrix product for all pairs is nearly twice as fast as one for each mention.
        logits = (queries.flatten(0, 1) @ keys.flatten(0, 1).T).view(*queries.shape[:2], *keys.shape[:2])
        if not self.mask_padding:
            return logits.softmax(dim=-1).mean(dim=1).transpose(0, 1)
        logits = logits.masked_fill(~mention["text_mask"], -torch.inf)
        query_mask = entity["text_mask"].to(logits.dtype)[:, :, None, None]
        return ((logits.softmax(dim=-1) * query_mask).sum(dim=1) / query_mask.sum(dim=1)).transpose(0, 1)

    def local_score(self, mention: dict[str, Tensor], entity: dict[str, Tensor], attention: Tensor) -> Tensor:
        """`<e, LN(c)>` of shape (M, N), from the attention."""
        context = attention @ at_least_float32(mention["text_value"])
        length = (context.square().mean(dim=-1) + self.eps).rsqrt()
        return dot(context, at_least_float32(entity["text_local"])) * length + entity["text_bias"]

    def global_score(self, mention: dict[str, Tensor], entity: dict[str, Tensor]) -> Tensor:
        return at_least_float32(mention["text_embed"]) @ at_least_float32(entity["text_embed"]).T

    def forward(self, mention: dict[str, Tensor], entity: dict[str, Tensor]) -> Tensor:
        """Scores of all pairs, (M, N)."""
        local = self.local_score(mention, entity, self.attention(mention, entity))
        return (self.global_score(mention, entity) + local) / 2

    def local_pairs(self, mention: dict[str, Tensor], entity: dict[str, Tensor]) -> Tensor:
        """`<e, LN(c)>` of each of G mentions with W entities of its own, (G, W); the entities' tensors are (G, W, ...).

        A mention's keys serve all of its entities: copying them for each pair would take longer than the attention.
        """
        queries, keys = at_least_float32(entity["text_query"]), at_least_float32(mention["text_key"])
        logits = queries.flatten(1, 2) @ keys.transpose(1, 2)
        if self.mask_padding:
            logits = logits.masked_fill(~mention["text_mask"].unsqueeze(1), -torch.inf)
        weights = logits.softmax(dim=-1).unflatten(1, queries.shape[1:3])
        if self.mask_padding:
            query_mask = entity["text_mask"].to(weights.dtype).unsqueeze(-1)
            attention = (weights * query_mask).sum(dim=2) / query_mask.sum(dim=2)
        else:
            attention = weights.mean(dim=2)
        context = attention @ at_least_float32(mention["text_value"])
        length = (context.square().mean(dim=-1) + self.eps).rsqrt()
        return dot(context, at_least_float32(entity["text_local"])) * length + entity["text_bias"]

    def score_pairs(self, mention: dict[str, Tensor], entity: dict[str, Tensor], local: Tensor | None = None) -> Tensor:
        """Scores of aligned pairs, of shape (pairs,); `local` are their [`local_pairs`], if these are known."""
        if local is None:
            local = self.local_pairs(mention, {name: tensor.unsqueeze(1) for name, tensor in entity.items()})[:, 0]
        return (dot(at_least_float32(mention["text_embed"]), at_least_float32(entity["text_embed"])) + local) / 2


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
    QUERY_STATS = ("q.q", "a.a", "a.h0", "a.m", "h0.m", "w.A", "beta.n", "upper_bound")

    def __init__(self, config: MimicConfig) -> None:
        super().__init__()
        size = config.vdlu_hidden_size
        self.size = size
        self.eps = config.layer_norm_eps
        self.cls_fc = UnitLinear(config.image_hidden_size, size)
        self.tokens_fc = UnitLinear(config.image_hidden_size, size)
        self.fc = UnitLinear(size, size)
        self.gate_fc = UnitLinear(size, 1)
        self.add_layer_norm = UnitLayerNorm(size, eps=config.layer_norm_eps)
        self.layer_norm = UnitLayerNorm(size, eps=config.layer_norm_eps)

    def _project(self, x: Tensor) -> Tensor:
        """`A_x` of a centerd x."""
        return linear_part(self.fc, scaled(self.add_layer_norm, x))

    def _h0(self, like: Tensor) -> Tensor:
        """`h0`, (d,), on the device and in the precision of a tensor of width d."""
        return called(self.fc, offset(self.add_layer_norm, like))

    def _gate(self, x: Tensor) -> Tensor:
        """`w . x`, without the bias."""
        return linear_part(self.gate_fc, x)[..., 0]

    def key_features(self, embeds: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """`z`: z~; `a`: A_z~; `k`: k~; and the numbers of `KEY_STATS`."""
        return self.key_features_of(centered(self.tokens_fc(tokens.mean(dim=1))), centered(self.cls_fc(embeds)))

    def key_features_of(self, z: Tensor, k: Tensor) -> dict[str, Tensor]:
        """The features of keys, of their z~ and k~."""
        projected = self._project(z)
        vectors = {"z": z, "a": centered(projected), "k": k}
        return {**vectors, "stats": self.key_stats(vectors, self._gate(projected))}

    def key_stats(self, vectors: dict[str, Tensor], gate: Tensor) -> Tensor:
        """The numbers of `KEY_STATS` for given vectors, of shape (N, 7); `gate` is w . A_z."""
        z, a, k = (at_least_float32(vectors[name]) for name in ("z", "a", "k"))
        h0 = centered(self._h0(z))
        return torch.stack([dot(z, z), dot(a, a), dot(k, k), a @ h0, dot(a, k), k @ h0, gate], dim=-1)

    def query_features(self, embeds: Tensor) -> dict[str, Tensor]:
        """`q`: q~; `a`: A_q~; `m`: (gamma_b * n)~ with n = LNb(q'); and the numbers of `QUERY_STATS`."""
        query = self.cls_fc(embeds)
        return self.query_features_of(centered(query), self.layer_norm(query))

    def query_features_of(self, q: Tensor, n: Tensor) -> dict[str, Tensor]:
        """The features of queries, of their q~ and n."""
        projected = self._project(q)
        m = centered(scaled(self.layer_norm, n))
        vectors = {"q": q, "a": centered(projected), "m": m}
        bias = n @ offset(self.layer_norm, n)
        return {**vectors, "stats": self.query_stats(vectors, self._gate(projected), bias)}

    def query_stats(self, vectors: dict[str, Tensor], gate: Tensor, bias: Tensor) -> Tensor:
        """The numbers of `QUERY_STATS` for given vectors, of shape (N, 8); `gate` is w . A_q, `bias` beta_b . n."""
        q, a, m = (at_least_float32(vectors[name]) for name in ("q", "a", "m"))
        h0 = centered(self._h0(q))
        numbers = [dot(q, q), dot(a, a), a @ h0, dot(a, m), m @ h0, gate, bias, self.upper_bound(m, bias)]
        return torch.stack(numbers, dim=-1)

    @staticmethod
    @torch.no_grad()
    def upper_bound(m: Tensor, bias: Tensor) -> Tensor:
        """The largest score that a query's vector m leaves any key, (N,): `bias` and, of a key of m's direction, |m|
        sqrt(d)."""
        return m.shape[-1] ** 0.5 * m.norm(dim=-1) + bias

    def forward(self, query: dict[str, Tensor], key: dict[str, Tensor]) -> Tensor:
        """Scores of all pairs, of shape (queries, keys)."""
        if is_traced():
            return self._score_unexpanded(query, key)
        size, eps = self.size, self.eps
        q, query_a, m = (at_least_float32(query[name]) for name in ("q", "a", "m"))
        z, key_a, k = (at_least_float32(key[name]) for name in ("z", "a", "k"))
        h0 = self._h0(q)
        h0_gate, h0_square = self._gate(h0), centered(h0).square().sum()
        query_stats = at_least_float32(query["stats"]).unsqueeze(1).unbind(-1)
        q_q, query_aa, query_ah, query_am, h0_m, query_gate, bias, _ = query_stats
        z_z, key_aa, k_k, key_ah, key_ak, h0_k, key_gate = at_least_float32(key["stats"]).unbind(-1)

        x_terms = q_q + z_z
        x_square = x_terms + 2 * (q @ z.T)
        r = (x_square.clamp(min=0) / size + eps).rsqrt()
        gate = torch.tanh(r * (query_gate + key_gate) + h0_gate + offset(self.gate_fc, h0))
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
        # Divided by a length that is infinite, a product of any size would be a score that looks sound.
        if not bool(torch.isfinite(x_square.detach().sum() + y_square.detach().sum())):
            score = score.masked_fill(~(torch.isfinite(x_square) & torch.isfinite(y_square)), torch.nan)
        return score

    def score_pairs(self, query: dict[str, Tensor], key: dict[str, Tensor]) -> Tensor:
        """Scores of aligned pairs, of shape (pairs,): sums are taken before their squares, so none is expanded."""
        q, query_a, m = (at_least_float32(query[name]) for name in ("q", "a", "m"))
        z, key_a, k = (at_least_float32(key[name]) for name in ("z", "a", "k"))
        query_stats, key_stats = at_least_float32(query["stats"]), at_least_float32(key["stats"])
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
        bias = _column(query_stats, self.QUERY_STATS, "beta.n")
        return self._score_of_sums(x_square, projected, gate, k, m, bias)

    def _score_unexpanded(self, query: dict[str, Tensor], key: dict[str, Tensor]) -> Tensor:
        """Scores of all pairs, (queries, keys), as published: slower than the expanded form, and the same for all
        values, so that a graph of it can be made."""
        q, m = (at_least_float32(query[name]).unsqueeze(1) for name in ("q", "m"))
        z, k = (at_least_float32(key[name]) for name in ("z", "k"))
        bias = _column(at_least_float32(query["stats"]), self.QUERY_STATS, "beta.n").unsqueeze(1)
        x = q + z
        projected = self._project(x)
        return self._score_of_sums(dot(x, x), centered(projected), self._gate(projected), k, m, bias)

    def _score_of_sums(
        self, x_square: Tensor, projected: Tensor, gate: Tensor, k: Tensor, m: Tensor, bias: Tensor
    ) -> Tensor:
        """Scores of pairs from `|x|^2`, `A_x~` and `w . A_x` of their sums `x = z~ + q~`."""
        h0 = self._h0(projected)
        r = (x_square / self.size + self.eps).rsqrt()
        gate = torch.tanh(r * gate + self._gate(h0) + offset(self.gate_fc, h0))
        y = gate.unsqueeze(-1) * (r.unsqueeze(-1) * projected + centered(h0)) + k
        y_square = y.square().mean(dim=-1)
        score = dot(y, m) * (y_square + self.eps).rsqrt() + bias
        return score + 0 * (x_square.detach() + y_square.detach())  # no number where a square is infinite


class VisionDualUnit(nn.Module):
    """VDLU: each side's pooled image against the other side's image tokens, with separate parameters."""

    def __init__(self, config: MimicConfig) -> None:
        super().__init__()
        self.dual_ent2men = VisionDualDirection(config)
        self.dual_men2ent = VisionDualDirection(config)

    def entity_features(self, embeds: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        return add_prefix("image_query_", self.dual_ent2men.query_features(embeds)) | add_prefix(
            "image_key_", self.dual_men2ent.key_features(embeds, tokens)
        )

    def mention_features(self, embeds: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        return add_prefix("image_query_", self.dual_men2ent.query_features(embeds)) | add_prefix(
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
            "image_query_stats": self.dual_ent2men.query_stats(pick_prefix("image_query_", vectors), *kept),
            "image_key_stats": self.dual_men2ent.key_stats(
                pick_prefix("image_key_", vectors), _column(key, names[1], "w.A")
            ),
        }

    def forward(self, mention: dict[str, Tensor], entity: dict[str, Tensor]) -> Tensor:
        """Scores of all pairs, (M, N)."""
        mention_query, mention_key = pick_prefix("image_query_", mention), pick_prefix("image_key_", mention)
        entity_query, entity_key = pick_prefix("image_query_", entity), pick_prefix("image_key_", entity)
        to_mention = self.dual_ent2men(entity_query, mention_key).T
        return (to_mention + self.dual_men2ent(mention_query, entity_key)) / 2

    def score_pairs(self, mention: dict[str, Tensor], entity: dict[str, Tensor]) -> Tensor:
        """Scores of aligned pairs, of shape (pairs,)."""
        mention_query, mention_key = pick_prefix("image_query_", mention), pick_prefix("image_key_", mention)
        entity_query, entity_key = pick_prefix("image_query_", entity), pick_prefix("image_key_", entity)
        to_mention = self.dual_ent2men.score_pairs(entity_query, mention_key)
        return (to_mention + self.dual_men2ent.score_pairs(mention_query, entity_key)) / 2


class CrossModalFusionUnit(nn.Module):
    """CMFU: on each side the text attends to the image, gated; the score is the dot product of the two sides."""

    def __init__(self, config: MimicConfig) -> None:
        super().__init__()
        size = config.cmfu_hidden_size
        self.text_fc = UnitLinear(config.text_embed_width, size)
        self.image_fc = UnitLinear(config.image_hidden_size, size)
        self.gate_fc = UnitLinear(size, 1)
        self.gate_layer_norm = UnitLayerNorm(size, eps=config.layer_norm_eps)

    def features(self, text_embeds: Tensor, image_tokens: Tensor) -> dict[str, Tensor]:
        text = self.text_fc(text_embeds)
        tokens = self.image_fc(image_tokens)
        weights = (tokens @ text.unsqueeze(-1)).softmax(dim=1)
        context = (weights * tokens).sum(dim=1)
        gate = torch.tanh(self.gate_fc(text))
        return {"cross_modal": self.gate_layer_norm(gate * text + context)}

    def forward(self, mention: dict[str, Tensor], entity: dict[str, Tensor]) -> Tensor:
        """Scores of all pairs, (M, N)."""
        return at_least_float32(mention["cross_modal"]) @ at_least_float32(entity["cross_modal"]).T

    def score_pairs(self, mention: dict[str, Tensor], entity: dict[str, Tensor]) -> Tensor:
        """Scores of aligned pairs, of shape (pairs,)."""
        return dot(at_least_float32(mention["cross_modal"]), at_least_float32(entity["cross_modal"]))


__all__ = ["CrossModalFusionUnit", "TextGlobalLocalUnit", "VisionDualDirection", "VisionDualUnit"]
