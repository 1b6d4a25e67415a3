"""A clone's folder `experiments/` under the name that it has in an installation, where it lies in this place."""

import pathlib

__path__ = [str(pathlib.Path(__file__).resolve().parents[2] / "experiments")]
