"""Published methods as recipes by name, and the recipe of resolved settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from qjax.configuration import store
from qjax.errors import InputError, listed, suggested
from qjax.matrix.arguments import Short
from qjax.pipeline.options import names
from qjax.pipeline.recipe import Recipe

__all__ = ["given_recipe", "preset", "recipe_of"]


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


def given_recipe(recipe: Short, bits: Short) -> Recipe:
    """The recipe that an argument stands for: a preset's name or a `Recipe`, with other `bits` than its own.

    Raises InputError for what is neither, and for bits that are no number.
    """
    if not (bits is None or (isinstance(bits, int | float) and not isinstance(bits, bool))):
        raise InputError(f"bits is {bits!r} ({type(bits).__name__}); it is a number, or None for the recipe's own")
    if isinstance(recipe, str):
        return preset(recipe, bits)
    if not isinstance(recipe, Recipe):
        raise InputError(
            f"recipe is {recipe!r} ({type(recipe).__name__}); give a preset's name such as 'quip_sharp', or a "
            "qjax.Recipe"
        )
    return recipe if bits is None else dataclasses.replace(recipe, bits=bits)


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
