"""Every random draw of a run is a pure function of a key such as ``(seed, "probes", step, layer)``.

A run that is resumed, distributed or repeated therefore sees the same numbers without any generator state
having to be saved: the key says it all.
"""

import hashlib

import torch
from torch import Tensor

__all__ = ["generator", "normal_like", "seed_from"]


def seed_from(*key: int | str) -> int:
    """Return a 63-bit seed that depends on every part of ``key`` and on nothing else.

    The parts are hashed (BLAKE2b), so that neighbouring keys give unrelated seeds.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh ``torch.Generator`` on ``device``, seeded by ``seed_from(*key)``.

    The meta device, where nothing is drawn, takes that of the CPU.
    """
    kind = torch.device(device)
    return torch.Generator("cpu" if kind.type == "meta" else kind).manual_seed(seed_from(*key))


def normal_like(like: Tensor, source: torch.Generator, std: float = 1.0) -> Tensor:
    """Return numbers from N(0, std^2) in the shape of ``like``: on the CPU, in its dtype, float32 for half.

    A seed then means the same numbers on every device. On the meta device, where there are none, ``like``
    itself is returned.
    """
    if like.is_meta:
        return like
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.empty(like.shape, dtype=dtype, device="cpu").normal_(0.0, std, generator=source)
