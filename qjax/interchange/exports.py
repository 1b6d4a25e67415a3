"""Formats of other tools that a compressed model can be written in: what each holds, and how."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from qjax.errors import InputError, ModelFileError
from qjax.interchange.integers import integers, reason
from qjax.models.checkpoints.packed import integers as layouts
from qjax.models.checkpoints.packed.integers import Integers
from qjax.registry import Registry

__all__ = ["EXPORTS", "Export"]


class Export(abc.ABC):
    """A format of Hugging Face folders."""

    @abc.abstractmethod
    def reason(self, operator: Any) -> str | None:
        """Why the format cannot hold an operator exactly; None where it can."""

    @abc.abstractmethod
    def arrays(self, operator: Any, name: str) -> dict[str, np.ndarray]:
        """The arrays of a linear, by the end of their names. Raises InputError with the reason where it cannot."""

    @abc.abstractmethod
    def settings(self, operators: Mapping[str, Any], dense: list[str]) -> dict[str, Any] | None:
        """`quantization_config` for the linears of a model by name, and its linears that are dense."""


EXPORTS: Registry[Export] = Registry("export format", "qjax.interchange.exports.EXPORTS")


class _Integers(Export):
    """Common part of the formats of integer codes."""

    def reason(self, operator: Any) -> str | None:
        """As `Export.reason`."""
        found = reason(operator)
        return self.refused(integers(operator, "the matrix")) if found is None else found

    def refused(self, matrix: Integers) -> str | None:
        """Why the format does not hold these integers."""
        return None

    @abc.abstractmethod
    def laid_out(self, matrix: Integers) -> dict[str, np.ndarray]:
        """The arrays of a matrix that is held."""

    def arrays(self, operator: Any, name: str) -> dict[str, np.ndarray]:
        """As `Export.arrays`."""
        matrix = integers(operator, name)
        if (why := self.refused(matrix)) is not None:
            raise InputError(f"{name} cannot be stored in this format: {why}")
        try:
            return self.laid_out(matrix)
        except ModelFileError as error:
            raise InputError(f"{name} cannot be stored in this format: {error}") from error


def _half(scale: np.ndarray) -> str | None:
    """Why scales cannot be float16; rounding them is the format's, overflow and underflow are not."""
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    if not np.isfinite(half).all() or (half[scale != 0] == 0).any():
        return f"its scales, {scale.min():.3g} to {scale.max():.3g}, leave the range of float16"
    return None


@EXPORTS.register("compressed-tensors")
class CompressedTensors(_Integers):
    """`pack-quantized`: 1 to 8 bits, symmetric or not, by row or group; scales in float16 where that is exact."""

    def refused(self, matrix: Integers) -> str | None:
        """Inputs in an order of their own."""
        if matrix.group_of is not None:
            return "its groups are of inputs in another order: use rounding.order=natural, or format=gptq"
        return None

    def laid_out(self, matrix: Integers) -> dict[str, np.ndarray]:
        """As `Export.arrays`."""
        found = layouts.compressed_tensors(matrix)
        with np.errstate(over="ignore"):
            half = matrix.scale.astype(np.float16)
        exact = np.array_equal(half.astype(np.float32), matrix.scale)
        return {**found, "weight_scale": half if exact else matrix.scale}

    def settings(self, operators: Mapping[str, Any], dense: list[str]) -> dict[str, Any]:
        """A group of the configuration for every width, symmetry and size of groups."""
        groups: dict[tuple[int, bool, int | None], list[str]] = {}
        for name, operator in operators.items():
            matrix = integers(operator, name)
            size = None if matrix.scale.shape[1] == 1 else matrix.group_size
            groups.setdefault((matrix.bits, matrix.zero is None, size), []).append(name)
        one = len(groups) == 1 and not dense
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "version": "0.20.1",  # the layout since 0.18
            "ignore": ["lm_head", *dense],
            "config_groups": {
                f"group_{index}": {
                    "targets": ["Linear"] if one else names,
                    "format": "pack-quantized",
                    "input_activations": None,
                    "output_activations": None,
                    "weights": {
                        "num_bits": bits,
                        "type": "int",
                        "symmetric": symmetric,
                        "strategy": "channel" if size is None else "group",
                        "group_size": size,
                        "dynamic": False,
                    },
                }
                for index, ((bits, symmetric, size), names) in enumerate(groups.items())
            },
        }


class _Equal(_Integers):
    """Common part of formats with one width, one size of groups and float16 scales for the whole model."""

    bits: ClassVar[tuple[int, ...]]

    def refused(self, matrix: Integers) -> str | None:
        """Widths that the format lacks, and scales beyond float16."""
        if matrix.bits not in self.bits:
            return f"its codes have {matrix.bits} bits (half-integers one more than asked for), there is {self.bits}"
        return _half(matrix.scale)

    def alike(self, operators: Mapping[str, Any], dense: list[str]) -> tuple[int, int, bool, bool]:
        """(bits, group size, symmetric, in an order of its own). Raises InputError for two settings in one model."""
        found: dict[tuple[int, int], str] = {}
        matrices = {name: integers(operator, name) for name, operator in operators.items()}
        for name, matrix in matrices.items():
            size = -1 if matrix.scale.shape[1] == 1 else matrix.group_size
            found.setdefault((matrix.bits, size), name)
        if len(found) != 1:
            shown = "; ".join(f"{name}: {bits} bits, groups of {size}" for (bits, size), name in found.items())
            raise InputError(
                f"this format has one width and size of groups for all linears ({shown}): use format=compressed-tensors"
            )
        [(bits, size)] = found
        symmetric = all(matrix.zero is None for matrix in matrices.values())
        return bits, size, symmetric, any(matrix.group_of is not None for matrix in matrices.values())


@EXPORTS.register("gptq")
class GPTQ(_Equal):
    """GPTQ's layout, version 2; scales are rounded to float16."""

    bits = (2, 3, 4, 8)

    def laid_out(self, matrix: Integers) -> dict[str, np.ndarray]:
        """As `Export.arrays`."""
        return layouts.gptq(matrix)

    def settings(self, operators: Mapping[str, Any], dense: list[str]) -> dict[str, Any]:
        """As `Export.settings`; dense linears are left out by name."""
        bits, size, symmetric, ordered = self.alike(operators, dense)
        settings = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": size,
            "desc_act": ordered,
            "sym": symmetric,
            "checkpoint_format": "gptq_v2",
            "pack_dtype": "int32",
            "lm_head": False,
        }
        return settings | ({"dynamic": {f"-:{name}": {} for name in dense}} if dense else {})


@EXPORTS.register("awq")
class AWQ(_Equal):
    """AWQ's GEMM layout, 4 bits; scales are rounded to float16."""

    bits = (4,)

    def laid_out(self, matrix: Integers) -> dict[str, np.ndarray]:
        """As `Export.arrays`."""
        return layouts.awq(matrix)

    def settings(self, operators: Mapping[str, Any], dense: list[str]) -> dict[str, Any]:
        """As `Export.settings`."""
        bits, size, _, _ = self.alike(operators, dense)
        return {
            "quant_method": "awq",
            "bits": bits,
            "group_size": size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["lm_head", *dense],
        }


@EXPORTS.register("hf")
class HuggingFace(Export):
    """A plain folder: every linear as the values that it stands for."""

    def reason(self, operator: Any) -> str | None:
        """None: every operator has values."""
        return None

    def arrays(self, operator: Any, name: str) -> dict[str, np.ndarray]:
        """`dequantize()`."""
        return {"weight": np.asarray(operator.dequantize())}

    def settings(self, operators: Mapping[str, Any], dense: list[str]) -> None:
        """None: nothing is quantised."""
        return None
