"""Where a sweep lies, for the processes that take part in it."""

from __future__ import annotations

import os
from typing import Any

from hydra.experimental.callback import Callback
from hydra.utils import to_absolute_path

__all__ = ["FOLDER", "Listener"]

FOLDER = "QJAX_SWEEP_FOLDER"  # where its jobs are listed, as the process that started it sees it


class Listener(Callback):
    """Hydra's callback in the process that starts a sweep: says where `hydra.sweep.dir` is, wherever that may be.

    `configs/quantize.yaml` names it, so it has the same name in a clone and in an installation.
    """

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        """Put the folder into the environment, which the processes that the launcher starts inherit."""
        os.environ[FOLDER] = to_absolute_path(str(config.hydra.sweep.dir))
