# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Comparing roundings on one matrix
#
# One matrix of the embedded model, its Hessian from real text, and every rounding algorithm at 2 bits: how much of
# the output's energy is lost (`proxy_loss`), beside the error of the weights themselves (`weight_mse`). Feedback
# makes the weights worse and the outputs better.

# %%
import jax
import numpy as np

import qjax

model = qjax.models.load("tiny")
tokens = qjax.data.load("pydoc", model.tokenizer, calibration_sequences=16, evaluation_sequences=4, length=256)
hessians = qjax.hessian.collect(model, tokens.calibration.tokens)
name = "layers.1.mlp.up_proj"
weight = model.params["blocks"][1]["mlp"]["up_proj"]["weight"]

# %% [markdown]
# ## Incoherence
# A randomised Hadamard transform on both sides spreads outliers: the largest entry, in units of the RMS, falls.

# %%
transform = qjax.incoherence.make("hadamard").sample(jax.random.key(0), *weight.shape)
for label, matrix in (("original", weight), ("rotated", transform.weight(weight))):
    print(f"{label:9s} largest / rms = {np.max(np.abs(matrix)) / np.sqrt(np.mean(np.square(matrix))):.2f}")

# %% [markdown]
# ## Roundings

# %%
reports = {}
for rounding in ("nearest", "gptq", "ldlq", "greedy"):
    for codebook in ("half_integer", "e8p"):
        if (rounding, codebook) == ("gptq", "e8p"):
            continue  # GPTQ rounds single columns; E8P codes eight at once
        _, reports[rounding, codebook] = qjax.quantize_matrix(
            weight,
            hessians[name],
            codebook=qjax.codebooks.make(codebook, 2),
            rounding=qjax.rounding.make(rounding),
            incoherence=qjax.incoherence.make("hadamard"),
            key=jax.random.key(0),
            name=name,
        )

# %%
print(f"{'rounding':10s} {'codebook':13s} {'proxy loss':>10s} {'weight mse':>10s}")
for (rounding, codebook), report in reports.items():
    print(f"{rounding:10s} {codebook:13s} {report.proxy_loss:10.4f} {report.weight_mse:10.4f}")
