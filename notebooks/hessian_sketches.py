# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
# ---
# %% [markdown]
# # Hessian sketches beside the true Fisher
#
# How much the model's output changes when one matrix changes by E is, to second order, `½ vec(E)ᵀ F vec(E)` with F
# the Fisher matrix: the mean of `vec(G) vec(G)ᵀ` over gradients G of the log-likelihood of *sampled* labels. F has
# (mn)² entries; what rounding can use is a Kronecker product `H_out ⊗ H_in`. LDLQ takes `I ⊗ E[x xᵀ]`; YAQA
# (2505.22988) sketches both factors from gradients. How alike they are is a cosine.

# %%
import numpy as np

import qjax
from qjax.hessian import alignment, exact_fisher
from qjax.hessian.fit import measure_fit

try:
    import matplotlib.pyplot as plt
except ImportError:  # the numbers need no figure: pip install -e '.[plots]' in a clone of qjax
    plt = None

model = qjax.models.load("tiny")
linears = list(qjax.models.structure(model.config).sites)  # of a block, in the order of the forward pass
tokens = qjax.data.load("pydoc", model.tokenizer, calibration_sequences=32, evaluation_sequences=16, length=96)

# %% [markdown]
# ## Three estimates from the same sequences

# %%
estimates = {
    name: qjax.hessian.collect(model, tokens.calibration.tokens, name) for name in ("input", "sketch_a", "sketch_b")
}
hessian = estimates["sketch_b"]["layers.1.self_attn.k_proj"]
print(f"k_proj of block 1: H_in {hessian.input.shape}, H_out {hessian.output.shape}")

# %% [markdown]
# ## The cosine with the true Fisher, on sequences that none of them saw
# F is never formed: with gradients G, G' of different sequences `⟨F, H_out ⊗ H_in⟩ = E[tr(H_out G H_in Gᵀ)]` and
# `‖F‖² = E[⟨G, G'⟩²]`.

# %%
fits = {}
for estimate, hessians in estimates.items():
    fits[estimate] = measure_fit(
        model.config,
        model.params,
        tokens.evaluation.tokens,
        lambda index, hessians=hessians: {linear: hessians[f"layers.{index}.{linear}"] for linear in linears},
    )
print(f"{'mean over blocks':20s}" + "".join(f"{estimate:>10s}" for estimate in fits))
cosine = {}
for linear in linears:
    cosine[linear] = {
        estimate: float(np.mean([fit.cosine for name, fit in found.items() if name.endswith(linear)]))
        for estimate, found in fits.items()
    }
    print(f"{linear:20s}" + "".join(f"{value:10.3f}" for value in cosine[linear].values()))

# %% [markdown]
# Both sketches know what `I ⊗ E[x xᵀ]` cannot: which outputs matter. (H_out of k_proj, in the figure below, shows
# the two heads of keys.) Which of them is ahead is a question of the number of sequences. The mean of these seven
# cosines, and that of k_proj, with other numbers of calibration sequences (same 16 for the evaluation):
#
# | sequences | 8 | 32 | 128 | 512 |
# |---|---:|---:|---:|---:|
# | sketch A, mean | 0.484 | 0.573 | 0.606 | 0.616 |
# | sketch B, mean | 0.408 | 0.558 | 0.647 | 0.678 |
# | sketch A, k_proj | 0.398 | 0.416 | 0.425 | 0.429 |
# | sketch B, k_proj | 0.547 | 0.660 | 0.740 | 0.756 |
#
# A counts every token as a sample, so its noise is small with few sequences; but it takes the tokens of a sequence
# as independent, which they are not, and more text does not mend that: in k_proj it stays where it is. B takes a
# whole sequence as one sample. It is unbiased and noisy, and goes on improving. With the 32 short sequences here
# the two are even. On SmolLM2 with 192 sequences sketch B is far ahead for q, k and v (README).

# %% [markdown]
# ## The same, with F written out
# A layer small enough to hold all of F: a softmax layer of 6 classes on 8 correlated inputs, whose gradient `(p −
# e_c) xᵀ` can be listed for many samples. The first step of YAQA's power iteration from the identity is `H_in =
# E[Gᵀ G]`, `H_out = E[G Gᵀ]`; a second one weights each by the other.

# %%
rng = np.random.default_rng(0)
x = rng.standard_normal((20_000, 8)) @ (rng.standard_normal((8, 8)) * np.exp(-np.arange(8) / 3)[:, None])
z = x @ rng.standard_normal((8, 6))
p = np.exp(z - z.max(axis=1, keepdims=True))
p /= p.sum(axis=1, keepdims=True)
labels = (rng.random((len(x), 1)) > np.cumsum(p, axis=1)).sum(axis=1).clip(max=5)
gradients = (p - np.eye(6)[labels])[:, :, None] * x[:, None, :]
fisher = exact_fisher(gradients)
factors = {"I ⊗ E[x xᵀ]": (np.eye(6), x.T @ x / len(x))}
h_out, h_in = np.eye(6), np.eye(8)
for step in (1, 2):
    h_out, h_in = (
        np.einsum("sij,jk,slk->il", gradients, h_in, gradients, optimize=True) / len(x),
        np.einsum("sji,jk,skl->il", gradients, h_out, gradients, optimize=True) / len(x),
    )
    h_out, h_in = h_out / np.trace(h_out), h_in / np.trace(h_in)
    factors[f"sketch, {step} step{'s' * (step > 1)}"] = (h_out, h_in)
small = {label: alignment(fisher, *pair) for label, pair in factors.items()}
for label, value in small.items():
    print(f"{label:16s} cosine {value:.4f}")

# %% [markdown]
# The best rank-one term of F, rearranged so that Kronecker products become outer products, is an upper bound for
# all.

# %%
rearranged = fisher.reshape(6, 8, 6, 8).transpose(0, 2, 1, 3).reshape(36, 64)
best = float(np.linalg.svd(rearranged, compute_uv=False)[0] / np.linalg.norm(rearranged))
print(f"best possible    cosine {best:.4f}")

# %%
if plt:
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained", width_ratios=[1.5, 1, 1])
    colours = {"input": "0.6", "sketch_a": "#edae49", "sketch_b": "#2e6f95"}
    labels = {"input": "I ⊗ E[x xᵀ]", "sketch_a": "sketch A", "sketch_b": "sketch B"}
    for offset, (estimate, colour) in enumerate(colours.items()):
        heights = [cosine[linear][estimate] for linear in linears]
        axes[0].bar(np.arange(len(linears)) + 0.27 * (offset - 1), heights, 0.25, color=colour, label=labels[estimate])
    axes[0].set_xticks(np.arange(len(linears)), [linear.split(".")[1].removesuffix("_proj") for linear in linears])
    axes[0].set(title="tiny: cosine with the true Fisher", ylim=(0, 1.25), yticks=np.linspace(0, 1, 6))
    axes[0].legend(frameon=False, ncols=3, loc="upper center")
    for axis, factor, label in ((axes[1], hessian.input, "H_in"), (axes[2], hessian.output, "H_out")):
        size = np.sqrt(np.abs(np.asarray(factor)))
        axis.imshow(size, cmap="magma_r", vmax=float(np.quantile(size, 0.995)), interpolation="nearest")
        axis.set(title=f"√|{label}| of sketch B, k_proj of block 1")
    plt.show()
