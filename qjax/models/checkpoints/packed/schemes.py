"""The schemes of quantised checkpoints: which arrays a linear has, how they are read, from `quantization_config`."""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from qjax.errors import ModelFileError, listed
from qjax.models.checkpoints.packed.floats import from_mxfp4, from_nvfp4
from qjax.models.checkpoints.packed.integers import from_awq, from_compressed_tensors, from_gptq
from qjax.registry import Registry

__all__ = ["SCHEMES", "Scheme", "scheme"]

Arrays = Mapping[str, np.ndarray]
_Shape = Callable[[str], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Scheme(abc.ABC):
    """How the quantised linears of a checkpoint are stored.

    Attributes:
      table: `quantization_config` of its `config.json`.
      where: that file, for messages.
      marks: the arrays of which every quantised linear has one, by which it is known.
      parts: the arrays that a linear may have, by the end of their names.
      activations: arrays for quantising activations at run time, which are left out: only weights are read.
    """

    table: Mapping[str, Any]
    where: str
    marks: ClassVar[tuple[str, ...]]
    parts: ClassVar[tuple[str, ...]]
    activations: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Raises ModelFileError for settings that are not read."""
        self.checked()

    def checked(self) -> None:  # noqa: B027  (most schemes have nothing to check before they read)
        """Raises ModelFileError for settings that are not read; none are looked at here."""

    @abc.abstractmethod
    def values(self, name: str, arrays: Arrays) -> np.ndarray:
        """The weight `[out, in]` of the linear `name`, float32. Raises ModelFileError for arrays that do not fit."""

    @abc.abstractmethod
    def shape(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """(out, in), from the shapes of the linear's arrays alone; of what only its values say, () ."""

    @property
    @abc.abstractmethod
    def title(self) -> str:
        """For tables: "GPTQ 4 bits"."""

    def _whole(self, key: str, allowed: tuple[int, ...]) -> int:
        value = self.table.get(key)
        if type(value) is not int or value not in allowed:
            raise ModelFileError(f"{self.where}: quantization_config.{key} is {value!r}; it is {listed(allowed)}")
        return value


SCHEMES: Registry[Scheme] = Registry("quantisation method", "qjax.models.checkpoints.packed.SCHEMES")
"""By `quant_method`."""


def scheme(table: Any, where: str) -> Scheme:
    """The scheme of a `quantization_config`. Raises ModelFileError for a method that is not known."""
    method = table.get("quant_method") if isinstance(table, Mapping) else table
    if method not in SCHEMES:
        raise ModelFileError(
            f"{where} has a quantization_config of the method {method!r}, which is not read; read are "
            f"{listed(SCHEMES)}. Take the original weights, or a checkpoint in one of these formats"
        )
    return SCHEMES.make(str(method), table, where)


@SCHEMES.register("gptq")
class GPTQ(Scheme):
    """GPTQ and GPTQModel, versions 1 and 2 (without `checkpoint_format` version 1), in any order of inputs."""

    marks = ("qweight",)
    parts = ("qweight", "qzeros", "scales", "g_idx")

    @property
    def bits(self) -> int:
        """Of a code."""
        return self._whole("bits", (2, 3, 4, 8))

    @property
    def version(self) -> int:
        """1 where zeros are stored less one."""
        found = self.table.get("checkpoint_format", "gptq")
        if found not in ("gptq", "gptq_v2"):
            raise ModelFileError(
                f"{self.where}: quantization_config.checkpoint_format is {found!r}; gptq and gptq_v2 are read"
            )
        return 2 if found == "gptq_v2" else 1

    @property
    def title(self) -> str:
        """GPTQ with its width."""
        return f"GPTQ {self.bits} bits"

    def values(self, name: str, arrays: Arrays) -> np.ndarray:
        """As `Scheme.values`."""
        return from_gptq(arrays, self.bits, name, self.version).values()

    def shape(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """As `Scheme.shape`."""
        height, rows = shapes["qweight"]
        return rows, height * 32 // self.bits


@SCHEMES.register("awq")
class AWQ(Scheme):
    """AWQ's GEMM layout, 4 bits."""

    marks = ("qweight",)
    parts = ("qweight", "qzeros", "scales")

    @property
    def title(self) -> str:
        """AWQ with its width."""
        return "AWQ 4 bits"

    def checked(self) -> None:
        """Raises ModelFileError for another version or width."""
        self._whole("bits", (4,))
        if (version := str(self.table.get("version", "gemm")).lower()) != "gemm":
            raise ModelFileError(f"{self.where}: quantization_config.version is {version!r}; AWQ's gemm is read")

    def values(self, name: str, arrays: Arrays) -> np.ndarray:
        """As `Scheme.values`."""
        return from_awq(arrays, 4, name).values()

    def shape(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """As `Scheme.shape`."""
        count, eighths = shapes["qweight"]
        return eighths * 8, count


@SCHEMES.register("compressed-tensors")
class CompressedTensors(Scheme):
    """compressed-tensors: packed integers of 1 to 8 bits, NVFP4, MXFP4, and plain 8-bit integers and floats.

    Each linear is read by the arrays that it has; its width comes from the group of the configuration that names it.
    """

    marks = ("weight_packed", "weight_scale")
    parts = (
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
        "weight_global_scale",
        "weight",
    )
    activations = ("input_scale", "input_zero_point", "input_global_scale")

    def checked(self) -> None:
        """Raises ModelFileError for rotations, which stored weights do not undo, and for a config without groups."""
        if self.table.get("transform_config"):
            raise ModelFileError(
                f"{self.where}: quantization_config.transform_config rotates activations at run time, which is not "
                "read; take a checkpoint without rotations"
            )
        groups = self.table.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise ModelFileError(
                f"{self.where}: quantization_config.config_groups is {groups!r}; a mapping is expected"
            )

    @property
    def title(self) -> str:
        """The format with its widths."""
        widths = sorted(
            {str(self._weights(group).get("num_bits", "?")) for group in self.table["config_groups"].values()}
        )
        return f"compressed-tensors {self.table.get('format', 'mixed')} {'/'.join(widths)} bits"

    def values(self, name: str, arrays: Arrays) -> np.ndarray:
        """As `Scheme.values`."""
        if "weight_packed" not in arrays:
            return _plain(arrays, name)
        if "weight_global_scale" in arrays:
            return from_nvfp4(arrays, name)
        weights = self._weights(self._group(name))
        if weights.get("type") == "float":
            return from_mxfp4(arrays, name)
        bits = weights.get("num_bits")
        if type(bits) is not int or not 1 <= bits <= 8:
            raise ModelFileError(f"{self.where}: the group of {name} has num_bits {bits!r}; 1 to 8 are read")
        return from_compressed_tensors(arrays, bits, name, self._dense).values()

    def shape(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """As `Scheme.shape`."""
        if "weight_packed" not in shapes:
            return shapes["weight"]
        if "weight_shape" in shapes:
            return ()
        rows, half = shapes["weight_packed"]
        return rows, 2 * half

    @property
    def _dense(self) -> bool | None:
        """Whether codes of 3, 5, 6, 7 bits are a dense stream, None where the file does not say who wrote it."""
        found = re.match(r"(\d+)\.(\d+)", str(self.table.get("version", "")))
        return None if found is None else (int(found[1]), int(found[2])) >= (0, 18)

    def _weights(self, group: Any) -> Mapping[str, Any]:
        weights = group.get("weights") if isinstance(group, Mapping) else None
        return weights if isinstance(weights, Mapping) else {}

    def _group(self, name: str) -> Any:
        """The group of a linear: one that names it, else the one of all linears."""
        groups = list(self.table["config_groups"].values())
        named = [(group, str(t)) for group in groups if isinstance(group, Mapping) for t in group.get("targets", ())]
        for group, target in named:
            pattern = target.removeprefix("re:")
            if name == target or (target.startswith("re:") and re.match(pattern, name)):
                return group
        for group, target in named:
            if target == "Linear":
                return group
        raise ModelFileError(f"{self.where}: no group of quantization_config.config_groups is for {name}")


@SCHEMES.register("fp8")
class FP8(Scheme):
    """8-bit floats with a scale for every block of rows and columns (DeepSeek's), or for a whole matrix."""

    marks = ("weight_scale_inv", "weight_scale")
    parts = ("weight", "weight_scale_inv", "weight_scale")
    activations = ("input_scale", "activation_scale")

    @property
    def title(self) -> str:
        """FP8 with its block."""
        block = self._block
        return "FP8" if block is None else f"FP8 with scales of {block[0]} × {block[1]}"

    @property
    def _block(self) -> tuple[int, int] | None:
        found = self.table.get("weight_block_size")
        if found is None:
            return None
        if not isinstance(found, list) or len(found) != 2 or not all(type(size) is int and size > 0 for size in found):
            raise ModelFileError(
                f"{self.where}: quantization_config.weight_block_size is {found!r}; it is two whole numbers or null"
            )
        return found[0], found[1]

    def values(self, name: str, arrays: Arrays) -> np.ndarray:
        """`w · scale` of the block. Raises ModelFileError for another number of scales."""
        weight = arrays["weight"].astype(np.float32)
        part = "weight_scale_inv" if "weight_scale_inv" in arrays else "weight_scale"
        scale, block = arrays[part].astype(np.float32), self._block
        if scale.size == 1:
            return weight * scale.reshape(1, 1)
        needed = None if block is None else tuple(-(-n // k) for n, k in zip(weight.shape, block, strict=True))
        if block is None or scale.shape != needed:
            raise ModelFileError(
                f"{name}.{part} has shape {list(scale.shape)}; a weight of {list(weight.shape)} in blocks of "
                f"{None if block is None else list(block)} (weight_block_size) has {needed or 'one scale'}"
            )
        whole = np.repeat(np.repeat(scale, block[0], axis=0), block[1], axis=1)
        return weight * whole[: weight.shape[0], : weight.shape[1]]

    def shape(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """As `Scheme.shape`."""
        return shapes["weight"]


def _plain(arrays: Arrays, name: str) -> np.ndarray:
    """`(weight − zero) · scale` of weights that are 8-bit integers or floats; a scale for a matrix, row, or group."""
    weight = arrays["weight"].astype(np.float32)
    scale = arrays["weight_scale"].astype(np.float32)
    scale = scale.reshape(1, 1) if scale.size == 1 else scale.reshape(len(weight), -1)
    if weight.shape[1] % scale.shape[1]:
        raise ModelFileError(
            f"{name}.weight_scale has shape {list(scale.shape)} and the weight {list(weight.shape)}; groups are equal "
            "parts of the inputs"
        )
    repeat = weight.shape[1] // scale.shape[1]
    zero = arrays.get("weight_zero_point")
    if zero is not None:
        weight = weight - np.repeat(zero.astype(np.float32).reshape(scale.shape), repeat, axis=1)
    return weight * np.repeat(scale, repeat, axis=1)
