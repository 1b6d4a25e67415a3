"""Published methods as recipes by name, and the recipe of resolved settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qjax.configuration import store
from qjax.errors import InputError, listed, suggested
from qjax.pipeline.options import names
from qjax.pipeline.recipe import Recipe

__all__ = ["preset", "recipe_of"]


def preset(name: str, bits: float | None = None) -> Recipe:
    """The recipe of a published method, as `qjax quantize preset=<name>` has it; with other `bits` than its own.

    Raises InputError for an unknown name, with the nearest.
    """
    if name not in names("preset"):
        raise InputError(
            f"recipe is {name!r}; there is no such preset{suggested(name, names('preset'))}: "
            f"{listed(names('preset'))}; or give a qjax.Recipe"
        )
    return recipe_of(_composed([f"preset={name}"] + ([] if bits is None else [f"bits={bits}"])))


def _composed(overrides: Sequence[str]) -> dict[str, Any]:
    """The settings of `experiments.quantize` with these overrides, as plain values."""
    import hydra  # here: only presets need it
    from omegaconf import OmegaConf

    store.fill()
    with hydra.initialize_config_dir(str(store.CONFIGS), version_base="1.3"):
        settings = OmegaConf.to_container(hydra.compose("quantize", list(overrides)), resolve=True)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


def recipe_of(settings: Mapping[str, Any]) -> Recipe:
    """The recipe that settings describe. Raises InputError for what does not exist or is out of range."""
    return Recipe(
        codebook={key: value for key, value in settings["codebook"].items() if value is not None},
        bits=settings["bits"],
        rounding=settings["rounding"],
        incoherence=settings["incoherence"],
        scale=settings["scale"],
        damping=settings["damping"],
        rules=settings["rules"],
        hessian=settings["hessian"],
        finetune=settings["finetune"],
    )
