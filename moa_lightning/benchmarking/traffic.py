"""The elementwise work of a feed-forward layer in bytes: what has to go through memory at the least.

A pass over elements costs what it moves, not what it computes, as long as it is one pass. So its price is counted in
bytes that cannot be avoided, each tensor read once and written once, and compared with a copy of such a tensor, which
reads and writes too. Per token, with hidden width h, s bytes a number and K coefficients (K² for pairs) in float32:

    plain   forward reads u, writes y;            backward reads dy, u, writes du               5 h s
    gated   forward reads a, b, writes y;         backward reads dy, a, b, writes da, db        8 h s
    each mixed branch of MoA: reads c twice, writes dc                                        + 12 K
    LA reads one c for all tokens (nothing per token), and its dc has one row a token           + 4 K

This is the traffic of one fused operation each way. Eager SwiGLU is four operations and moves more.
"""

from ..feedforward import FFNConfig

COEFFICIENT = 4  # bytes of a float32


def bytes_per_token(hidden_dim: int, config: FFNConfig, itemsize: int) -> int:
    """Bytes that the activation of one token moves at the least, forward and backward.

    Args:
        hidden_dim: h.
        config: of the layer.
        itemsize: bytes of a number of the hidden activation.
    """
    hidden = (8 if config.gated else 5) * hidden_dim * itemsize
    uses = {"fixed": 0, "la": 1, "moa": 3}[config.mixing]
    return hidden + config.mixed_branches * uses * config.entries * COEFFICIENT
