"""Stands in for jaxtyping where only jax is installed: annotations without checks."""

from jax import Array


class _Annotation:
    def __class_getitem__(cls, item: object) -> type:
        return cls


Float = Int = Integer = UInt = UInt8 = UInt16 = UInt32 = Bool = Num = Shaped = Complex = _Annotation

__all__ = ["Array", "Bool", "Complex", "Float", "Int", "Integer", "Num", "Shaped", "UInt", "UInt8", "UInt16", "UInt32"]
