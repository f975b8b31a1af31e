r"""Spherical k-means: the k directions that a set of vectors clusters around.

    maximise   sum over i of <u_i, c_{a(i)}>,   u_i = x_i / |x_i|,   |c_k| = 1,   a(i) = argmax_k <u_i, c_k>

by turns: assign every vector to its nearest centre, move every centre to the mean direction of its vectors
(Dhillon and Modha 2001). A centre that lost all of its vectors starts anew at one of those that are worst
served, so that k centres stay k.
"""

import torch
from torch import Tensor
from torch.nn import functional

from localgpt_core.common.modes import in_float32
from localgpt_core.common.validation import require

__all__ = ["spherical_kmeans"]

ROUNDS = 12
ROWS = 8192  # vectors assigned at one time: a table of ROWS x k cosines has to fit


@in_float32
def spherical_kmeans(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Return k unit vectors (k x d), the centres of the directions of the rows of x (n x d).

    The start are k of the rows, drawn by ``generator``. Half-precision rows are clustered in float32.

    Raises:
        ValueError: If k exceeds n.
    """
    require(k <= len(x), "k", k, f"must be at most the {len(x)} vectors to cluster")
    directions = functional.normalize(x, dim=-1)
    first = torch.randperm(len(x), generator=generator, device=generator.device)[:k]
    centres = directions[first.to(x.device)]
    for _ in range(ROUNDS):
        nearest = [(rows @ centres.T).max(dim=-1) for rows in directions.split(ROWS)]
        cosines = torch.cat([found.values for found in nearest])
        members = torch.cat([found.indices for found in nearest])
        sums = torch.zeros_like(centres).index_add_(0, members, directions)
        centres = functional.normalize(sums, dim=-1)
        empty = torch.bincount(members, minlength=k) == 0
        if empty.any():
            centres[empty] = directions[cosines.argsort()[: int(empty.sum())]]
    return centres
