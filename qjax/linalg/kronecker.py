"""The Hessian of one linear layer's loss, in Kronecker form."""

from __future__ import annotations

from qjax.typing import Leaf, pytree, static

__all__ = ["Hessian"]


@pytree
class Hessian:
    """`H ≈ H_out ⊗ H_in` of a layer `y = x Wᵀ`, W [out, in].

    Attributes:
      input: `[in, in]` float32, the uncentred second moment `E[x xᵀ]` or a sketch's input factor.
        Its scale has no meaning.
      output: `[out, out]` float32, or None for the identity (GPTQ, LDLQ).
      tokens: how many tokens (or sequences, for a per-sequence sketch) were averaged.
      cross: `[in, in]` `E[x zᵀ]` of the original inputs x and those of the quantised stream z, or None.
      pooled: of an expert: `[in, in]` the input factor over all tokens, whether they are routed to it or not; None for
        all other linears. `qjax.hessian.experts` makes one factor of both.
    """

    input: Leaf
    output: Leaf = None
    tokens: int = static(default=0)
    cross: Leaf = None
    pooled: Leaf = None
