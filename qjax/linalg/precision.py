"""The precision of matrix products in Hessians and feedback."""

import jax

__all__ = ["precise"]

precise = jax.lax.Precision.HIGHEST
