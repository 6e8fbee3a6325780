"""The published scores, written down in the plainest way: one equation after the other, every pair in full.

It is the yardstick for the factored form of `modeling_mimic.py`, with which it shares no code: tests compare the two,
and the benchmarks time them. It works in the dtype of what it is given, so float64 weights and inputs give reference
values, and half precision shows what half precision costs.

Shapes: M mentions, N entities, L text tokens, P image tokens. Subscript m is the mention's, e the entity's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = Mapping[str, Tensor]  # a state dict, under the names of published checkpoints
EPS = 1e-5


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def layer_norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    weight = weights[f"{name}.weight"]
    return F.layer_norm(x, weight.shape, weight, weights[f"{name}.bias"], EPS)


def tglu(
    weights: Weights,
    t_m: Tensor,
    T_m: Tensor,
    t_e: Tensor,
    T_e: Tensor,
    mask_m: Tensor | None = None,
    mask_e: Tensor | None = None,
    unit: str = "matcher.tglu",
) -> Tensor:
    """`s_text`, (M, N). The published model has no masks; with them, padding takes no part in attention and mean."""
    Q = linear(weights, f"{unit}.fc_query", T_e)
    K = linear(weights, f"{unit}.fc_key", T_m)
    U = linear(weights, f"{unit}.fc_value", T_m)
    logits = torch.einsum("eid,mjd->meij", Q, K) / Q.shape[-1] ** 0.5
    if mask_m is not None:
        logits = logits.masked_fill(mask_m[:, None, None, :] == 0, -torch.inf)
    A = logits.softmax(dim=-1)
    AU = torch.einsum("meij,mjd->meid", A, U)
    if mask_e is None:
        c = AU.mean(dim=2)
    else:
        tokens = mask_e.to(AU.dtype)[None, :, :, None]
        c = (AU * tokens).sum(dim=2) / tokens.sum(dim=2)
    g2g = t_m @ t_e.T
    g2l = (linear(weights, f"{unit}.fc_cls", t_e) * layer_norm(weights, f"{unit}.layer_norm", c)).sum(dim=-1)
    return (g2g + g2l) / 2


def dual(weights: Weights, q: Tensor, k: Tensor, Z: Tensor, unit: str) -> Tensor:
    """`dual(q; k, Z)` of each query with each key, (queries, keys)."""
    q = linear(weights, f"{unit}.cls_fc", q)[:, None]
    k = linear(weights, f"{unit}.cls_fc", k)[None]
    z = linear(weights, f"{unit}.tokens_fc", Z).mean(dim=1)[None]
    h = linear(weights, f"{unit}.fc", layer_norm(weights, f"{unit}.add_layer_norm", z + q))
    g = torch.tanh(linear(weights, f"{unit}.gate_fc", h))
    left = layer_norm(weights, f"{unit}.layer_norm", g * h + k)
    right = layer_norm(weights, f"{unit}.layer_norm", q)
    return (left * right).sum(dim=-1)


def vdlu(weights: Weights, v_m: Tensor, V_m: Tensor, v_e: Tensor, V_e: Tensor, unit: str = "matcher.vdlu") -> Tensor:
    """`s_image`, (M, N)."""
    entity_to_mention = dual(weights, v_e, v_m, V_m, f"{unit}.dual_ent2men").T
    mention_to_entity = dual(weights, v_m, v_e, V_e, f"{unit}.dual_men2ent")
    return (entity_to_mention + mention_to_entity) / 2


def cmfu_side(weights: Weights, t: Tensor, V: Tensor, unit: str = "matcher.cmfu") -> Tensor:
    """`f` of B mentions or entities, (B, d)."""
    u = linear(weights, f"{unit}.text_fc", t)
    G = linear(weights, f"{unit}.image_fc", V)
    a = torch.einsum("bpd,bd->bp", G, u).softmax(dim=-1)
    c = torch.einsum("bp,bpd->bd", a, G)
    gate = torch.tanh(linear(weights, f"{unit}.gate_fc", u))
    return layer_norm(weights, f"{unit}.gate_layer_norm", gate * u + c)


def cmfu(weights: Weights, t_m: Tensor, V_m: Tensor, t_e: Tensor, V_e: Tensor, unit: str = "matcher.cmfu") -> Tensor:
    """`s_cross`, (M, N)."""
    return cmfu_side(weights, t_m, V_m, unit) @ cmfu_side(weights, t_e, V_e, unit).T


def normalised(weights: Weights, encoded: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`t, T, v, V` after the layer norms that mentions and entities share."""
    return (
        layer_norm(weights, "matcher.text_cls_layernorm", encoded["text_embeds"]),
        layer_norm(weights, "matcher.text_tokens_layernorm", encoded["text_tokens"]),
        layer_norm(weights, "matcher.image_cls_layernorm", encoded["image_embeds"]),
        layer_norm(weights, "matcher.image_tokens_layernorm", encoded["image_tokens"]),
    )


def scores(
    weights: Weights,
    mention: Mapping[str, Tensor],
    entity: Mapping[str, Tensor],
    mask_m: Tensor | None = None,
    mask_e: Tensor | None = None,
) -> dict[str, Tensor]:
    """All four score matrices, each (M, N), from what the encoder gives for mentions and entities."""
    t_m, T_m, v_m, V_m = normalised(weights, mention)
    t_e, T_e, v_e, V_e = normalised(weights, entity)
    text = tglu(weights, t_m, T_m, t_e, T_e, mask_m, mask_e)
    image = vdlu(weights, v_m, V_m, v_e, V_e)
    cross_modal = cmfu(weights, t_m, V_m, t_e, V_e)
    return {
        "logits": (text + image + cross_modal) / 3,
        "text_logits": text,
        "image_logits": image,
        "cross_modal_logits": cross_modal,
    }


def loss(scores: Mapping[str, Tensor]) -> Tensor:
    """The published loss: each of B mentions against the B entities of the batch, of which its row's is its own."""
    names = ("logits", "text_logits", "image_logits", "cross_modal_logits")
    target = torch.arange(scores["logits"].shape[0], device=scores["logits"].device)
    return sum((F.cross_entropy(scores[name], target) for name in names), start=torch.zeros(()))


def realistic_rank(scores: Tensor, answer: int) -> float:
    """Place of the answer among all entities by score, counted from 1: the mean of the best and the worst place among
    those that score the same."""
    higher = int((scores > scores[answer]).sum())
    equal = int((scores == scores[answer]).sum())
    return higher + (equal + 1) / 2
