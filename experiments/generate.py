"""Continue a text: `python -m experiments.generate artifact=runs/a/artifact prompt="The function returns"`."""

from __future__ import annotations

from omegaconf import DictConfig

from experiments._entry import cache_folder, compilation_cache, entry, plain
from qjax import artifact, models


@entry("generate")
def main(config: DictConfig) -> None:
    """Print the prompt and its most likely continuation."""
    settings = plain(config)
    compilation_cache(cache_folder(settings["cache"]))
    if settings["artifact"] is not None:
        model = artifact.load(settings["artifact"])
    else:
        model = models.load(settings["model"]["source"], settings["model"]["dtype"])
    prompt = model.tokenizer.encode(settings["prompt"])
    new = models.generate(model.params, model.config, prompt, settings["max_new_tokens"], eos_id=model.tokenizer.eos_id)
    print(settings["prompt"] + model.tokenizer.decode(new))


if __name__ == "__main__":
    main()
