"""Randomness that depends on names and sample ids only, never on rank, worker, device or order of calls.

Augmentations, crops and masks are drawn from (seed, epoch, sample id), initial parameters from (seed, parameter name).
The mixing function is the finaliser of SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number
Generators", OOPSLA 2014), which torch can compute on int64 tensors of any device because two's-complement
multiplication wraps.
"""

import hashlib

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _splitmix(z: int) -> int:
    z = (z + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
    return z ^ (z >> 31)


def sample_seed(seed: int, epoch: int, sample_id: int) -> int:
    """A 63-bit seed for one sample in one epoch."""
    return _splitmix(_splitmix(_splitmix(seed & _MASK) ^ (epoch & _MASK)) ^ (sample_id & _MASK)) >> 1


def named_seed(seed: int, name: str) -> int:
    """A 63-bit seed for something that has a name, such as a parameter."""
    digest = hashlib.blake2b(name.encode(), digest_size=8, key=(seed & _MASK).to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") >> 1


def _signed(value: int) -> int:
    """The 64-bit pattern `value` as the int64 that torch stores."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical (not arithmetic) right shift of int64 bit patterns."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def uniform(seeds: Tensor, n: int, stream: int = 0) -> Tensor:
    """n numbers in [0, 1) for each seed, from a counter: the same on every device and in every batch.

    Args:
        seeds: int64 (B,), for instance `batch["seed"]`.
        n: numbers per seed.
        stream: separates independent uses of the same seed (masks, noise, ...).

    Returns:
        float32 (B, n), multiples of 2^-24.
    """
    counter = torch.arange(stream << 32, (stream << 32) + n, device=seeds.device, dtype=torch.int64)
    z = seeds[:, None] + (counter[None, :] + 1) * _signed(_GOLDEN)
    z = (z ^ _shift_right(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shift_right(z, 27)) * _signed(_MIX_2)
    z = z ^ _shift_right(z, 31)
    return _shift_right(z, 40).to(torch.float32) / (1 << 24)
