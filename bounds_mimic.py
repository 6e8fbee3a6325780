"""Upper bounds of scores, which a search prunes with. They are made from the features of each side alone.

The attention's part of a score is `b + (c . w) / sqrt(|c|^2 / d + eps)`, with the entity's vector w and number b. Here
c is a convex combination of the mention's centered value vectors u_1 .. u_L. So whatever the entity's tokens are, the
part is bounded by

- a few balls that hold the u_j: with centers z_k and radii R_k, `c . w` is at most the largest `z_k . w + R_k |w|`;
- the hull: `c . w` is between the smallest and the largest `u_j . w`;

and by `|c|^2`, which is between the squared distance of the hull from the origin and the largest `|u_j|^2`.

The image unit's part is at most `|m| sqrt(d)` in each direction, because it is the length of a vector divided by its
own.

The bounds hold for any tokens of an entity. Knows the units, but not the search that uses the bounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .features_mimic import LARGEST
from .matching_mimic import HALF_UNITS, Matcher, MentionFeatures, VisionDualDirection, at_least_float32

# Balls that hold a mention's value vectors.
_BALLS = 4
_IMAGE_BOUND = VisionDualDirection.QUERY_STATS.index("upper_bound")
# What the coarse bounds need of an entity's features.
COARSE_NAMES = ("text_embed", "cross_modal", "text_local", "text_bias", "image_query_stats")


@dataclass
class CoarseFeatures:
    """What the coarse bounds need of N entities."""

    text: Tensor  # (N, projection_dim)
    cross_modal: Tensor  # (N, d)
    local: Tensor  # (N, d + 1): w, and its length
    most: Tensor  # (N,) the most that the entity's side of the image unit adds to a total
    offset: Tensor  # (N,) that, and the attention's b

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> CoarseFeatures:
        local = at_least_float32(tensors["text_local"])
        most = cls.most_of(tensors)
        return cls(
            at_least_float32(tensors["text_embed"]),
            at_least_float32(tensors["cross_modal"]),
            torch.cat([local, local.norm(dim=-1, keepdim=True)], dim=1),
            most,
            torch.add(most, at_least_float32(tensors["text_bias"]), alpha=1 / HALF_UNITS),
        )

    @staticmethod
    def most_of(tensors: dict[str, Tensor]) -> Tensor:
        return at_least_float32(tensors["image_query_stats"][:, _IMAGE_BOUND]) / HALF_UNITS

    def extent(self) -> Tensor:
        """The largest size of each kind of number but the products, (3,); NaN where any of these is not sound.

        A number is sound if it is finite and no larger than `LARGEST`.
        """
        extremes = torch.stack([*self.text.aminmax(), *self.cross_modal.aminmax()]).abs()
        largest = torch.stack([self.most.abs().amax(), self.offset.abs().amax(), self.local[:, -1].amax()])
        sound = (torch.cat([extremes, largest]) <= LARGEST).all()
        return torch.where(sound, largest, torch.nan)

    def sizes(self) -> Tensor:
        """The size of each kind of number of each entity, (N, 4): those of the extent, and of the vectors' numbers."""
        rest = torch.maximum(self.text.abs().amax(dim=1), self.cross_modal.abs().amax(dim=1))
        return torch.stack([self.most.abs(), self.offset.abs(), self.local[:, -1], rest], dim=1)


@dataclass
class MentionBounds:
    """What bounds the attention's part for each of M mentions."""

    values: Tensor  # (M, L, d) centerd value vectors; of padding, repeats of a real one
    balls: Tensor  # (K * M, d + 1) centers of K balls that hold them, and their radii; all first balls come first
    by_small: Tensor  # (M, 1) 1 / sqrt(s / d + eps) where s is at most the squared distance of the hull from the origin
    by_large: Tensor  # (M, 1) the same for the largest |u_j|^2
    cap: Tensor  # (M, 1) the largest attention's part of a w of length 1

    @classmethod
    def of(cls, matcher: Matcher, mentions: MentionFeatures) -> MentionBounds:
        values = at_least_float32(mentions.tensors["text_value"])
        if matcher.tglu.mask_padding:
            mask = mentions.tensors["text_mask"]
            first = mask.int().argmax(dim=1)
            real = values[torch.arange(len(values), device=values.device), first].unsqueeze(1)
            values = torch.where(mask.unsqueeze(-1), values, real)
        count, size, eps = min(_BALLS, values.shape[1]), values.shape[-1], matcher.tglu.layer_norm.eps
        balls = torch.cat(_balls(values, count), dim=2).transpose(0, 1).flatten(0, 1)
        largest = values.square().sum(dim=-1).amax(dim=1, keepdim=True)
        by_small, by_large = ((square / size + eps).rsqrt() for square in (hull_distance(values), largest))
        return cls(values, balls, by_small, by_large, largest.sqrt() * by_large)

    def ball(self, local: Tensor) -> Tensor:
        """Upper bounds (M, N) of the attention's part, less b; `local` is w and its length, (N, d + 1)."""
        upper = (self.balls @ local.T).unflatten(0, (-1, len(self.values))).amax(dim=0)
        # The larger factor where the bound is positive, the smaller where it is negative.
        return torch.maximum(upper * self.by_small, upper.mul_(self.by_large))

    def hull(self, row: int, local: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds (N,) of the attention's part of one mention, less b; `local` is w, (N, d)."""
        products = local @ self.values[row].T
        lower, upper = products.aminmax(dim=1)
        small, large = self.by_small[row], self.by_large[row]
        return torch.minimum(lower * small, lower * large), torch.maximum(upper * small, upper * large)


def _balls(points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Centres (M, count, d) and radii (M, count, 1) of balls that hold each of M sets of points (M, L, d).

    The points nearest to each of `count` of them that are far apart (each the farthest from those before) make a ball
    around their mean. Padding and function words lie close together, so that a few small balls hold them.
    """
    every = torch.arange(len(points), device=points.device)
    distances = torch.cdist(points, points)
    picked = [(points - points.mean(dim=1, keepdim=True)).norm(dim=-1).argmin(dim=1)]
    nearest = distances[every, picked[0]]
    for _ in range(count - 1):
        picked.append(nearest.argmax(dim=1))
        nearest = torch.minimum(nearest, distances[every, picked[-1]])
    to_picked = distances.gather(1, torch.stack(picked, dim=1).unsqueeze(-1).expand(-1, -1, points.shape[1]))
    member = torch.nn.functional.one_hot(to_picked.argmin(dim=1), count).to(points.dtype)
    centers = member.transpose(1, 2) @ points / member.sum(dim=1).clamp(min=1).unsqueeze(-1)
    radii = ((points.unsqueeze(2) - centers.unsqueeze(1)).norm(dim=-1) * member).amax(dim=1)
    # An empty ball, of points that are all the same, must not lower a bound: it repeats the first.
    empty = member.sum(dim=1) == 0
    radii = torch.where(empty, radii[:, :1], radii).unsqueeze(-1)
    return torch.where(empty.unsqueeze(-1), centers[:, :1], centers), radii


def hull_distance(points: Tensor, steps: int = 100) -> Tensor:
    """A lower bound (M, 1) of the squared distance of the origin from the hull of each of M sets of points (M, L, d).

    Pairwise Frank-Wolfe with exact steps on `min |x|^2`, x in the hull: weight moves from the point with the largest
    `<x, v>` to that with the smallest. At any x the distance squared is at least `|x|^2 - gap` with the duality gap
    `2 <x, x - v>`, v the point with the smallest `<x, v>`; and, as any hull point's dot product with x is at least
    `<x, v>`, it is also at least `(<x, v> / |x|)^2` where that product is positive.
    """
    gram = points @ points.transpose(1, 2)
    squares = gram.diagonal(dim1=1, dim2=2)
    rows = torch.arange(points.shape[0], device=points.device)
    tiny = torch.finfo(points.dtype).tiny
    weights = torch.zeros(points.shape[:2], dtype=points.dtype, device=points.device)
    weights[rows, squares.argmin(dim=1)] = 1
    best = torch.zeros(points.shape[0], dtype=points.dtype, device=points.device)
    for step in range(steps):
        products = (gram @ weights.unsqueeze(-1)).squeeze(-1)  # <x, u_j>
        square = (weights * products).sum(dim=1)
        smallest, to = products.min(dim=1)
        gap = 2 * (square - smallest)
        positive = smallest.clamp(min=0)
        bound = positive * (positive / square.clamp(min=tiny))
        best = torch.maximum(best, torch.maximum(square - gap, bound))
        if step % 10 == 9 and bool((square - best <= 1e-3 * square + 1e-12).all()):
            break
        largest, away = products.masked_fill(weights <= 0, -torch.inf).max(dim=1)
        # |x + t (to - away)|^2 is smallest at t = <x, away - to> / |to - away|^2.
        distance = squares[rows, to] + squares[rows, away] - 2 * gram[rows, to, away]
        move = ((largest - smallest) / distance.clamp(min=tiny)).clamp(min=0).minimum(weights[rows, away])
        weights[rows, to] += move
        weights[rows, away] -= move
    # The sums above are rounded: keep clear of it.
    return (best * (1 - 1e-4) - 1e-6 * squares.amax(dim=1)).clamp(min=0).unsqueeze(1)


__all__ = ["COARSE_NAMES", "CoarseFeatures", "MentionBounds", "hull_distance"]
