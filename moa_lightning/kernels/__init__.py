"""The mix of activations as one operation with several implementations behind one signature.

    mix(u, c, names)          sum_k c_k sigma_k(u)                    u (..., h), c (..., K) or (K,)
    mix_pairs(a, b, c, names) sum_kl c_kl sigma_k(a) sigma_l(b)       a, b (..., h), c (..., K, K) or (K, K)

All compute in float32 at least and return u's dtype. An entry whose coefficient is exactly 0 contributes nothing, even
where its activation overflows. `reference` is what autograd makes of the formula; `recompute` keeps only u and c for
the backward pass instead of K activated tensors, and is what FeedForward uses.
"""

from .recompute import mix, mix_pairs

__all__ = ["mix", "mix_pairs"]
