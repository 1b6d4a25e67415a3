# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Incoherence, seen
#
# A quantiser with one scale pays for its largest entry. The randomised Hadamard transform (RHT) turns a weight
# matrix in random, but cheap and exactly invertible, directions: `W̃ = U W Vᵀ`. The sum of squares stays, outliers
# do not. In numbers: `μ_W = max|W_ij| √(mn) / ‖W‖_F` of the weight, and for the Hessian `μ_H = max|Q_ij| √n` over
# its eigenvectors Q (QuIP, 2307.13304, definition 1).

# %%
import jax
import jax.numpy as jnp
import numpy as np

import qjax

try:
    import matplotlib.pyplot as plt
except ImportError:  # the numbers need no figure: pip install -e '.[plots]' in a clone of qjax
    plt = None

model = qjax.models.load("tiny")
tokens = qjax.data.load("pydoc", model.tokenizer, calibration_sequences=16, evaluation_sequences=4, length=256)
hessians = qjax.hessian.collect(model, tokens.calibration.tokens)


def weight_of(name):
    _, block, group, linear = name.split(".")
    return jnp.asarray(model.params["blocks"][int(block)][group][linear]["weight"])


# %% [markdown]
# ## Every matrix of the model

# %%
rht = qjax.incoherence.make("hadamard")
mu, transforms = {}, {}
for index, name in enumerate(hessians):
    weight = weight_of(name)
    transforms[name] = rht.sample(jax.random.fold_in(jax.random.key(0), index), *weight.shape)
    mu[name] = tuple(float(qjax.incoherence.weight_incoherence(w)) for w in (weight, transforms[name].weight(weight)))

print(f"{'matrix':26s} {'μ before':>9s} {'μ after':>8s}")
for name, (before, after) in mu.items():
    print(f"{name:26s} {before:9.2f} {after:8.2f}")

# %% [markdown]
# After the transform every matrix looks like Gaussian noise, whose largest of mn entries lies near `√(2 ln mn)`
# standard deviations. A matrix whose μ was below that before (a small, well-trained one may be) gains nothing: the
# transform makes all matrices alike, so that one codebook, made for Gaussians, suits all.

# %%
name = max(mu, key=lambda name: mu[name][0])
turn = transforms[name]
weight, rotated = (np.asarray(w) for w in (weight_of(name), turn.weight(weight_of(name))))
back = np.asarray(turn.weight_inverse(jnp.asarray(rotated)))
expected = np.sqrt(2 * np.log(weight.size))
print(f"{name}: μ {mu[name][0]:.2f} -> {mu[name][1]:.2f} (a Gaussian of this size: about {expected:.2f})")
print(f"sum of squares {np.sum(weight**2):.4f} -> {np.sum(rotated**2):.4f}")
print(f"round trip within {np.abs(back - weight).max():.1e}")

# %% [markdown]
# ## The inputs
# The Hessian `E[x xᵀ]` has outliers too: a few channels carry most of the energy. The same rotation V acts on it.

# %%
hessian = jnp.asarray(hessians[name].input)
turned = turn.input_hessian(hessian)
share = {
    label: float(np.max(np.diagonal(h)) / np.mean(np.diagonal(h)))
    for label, h in (("before", hessian), ("after", turned))
}
mu_h = {label: float(qjax.incoherence.hessian_incoherence(h)) for label, h in (("before", hessian), ("after", turned))}
for label in share:
    print(f"{label:7s} largest / mean diagonal of H {share[label]:6.2f}, μ_H {mu_h[label]:.2f}")

# %% [markdown]
# ## An outlier, planted
# One entry made 50 times the RMS of the matrix: rounded to the nearest of 4 levels as it is, and after the
# rotation. The scale is set by the RMS in both cases, so what lies outside the grid is clipped.

# %%
planted = np.array(weight)
planted[3, 5] = 50 * np.sqrt(np.mean(weight**2))
errors = {}
for kind in ("none", "hadamard"):
    _, report = qjax.quantize_matrix(
        planted,
        qjax.Hessian(np.eye(weight.shape[1], dtype=np.float32)),
        codebook=qjax.codebooks.make("half_integer", 2),
        rounding=qjax.rounding.make("nearest"),
        incoherence=qjax.incoherence.make(kind),
        key=jax.random.key(0),
        name=name,
    )
    errors[kind] = report.weight_mse
    print(f"incoherence={kind:9s} ‖E‖²/‖W‖² = {report.weight_mse:.4f}")

# %%
if plt:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    edges = np.linspace(-expected - 3, expected + 3, 120)
    for values, label, colour in ((weight, "original", "#d1495b"), (rotated, "rotated", "#2e6f95")):
        values = values.ravel() / np.sqrt(np.mean(weight**2))
        axes[0].hist(
            np.clip(values, edges[0], edges[-1]), edges, density=True, histtype="step", label=label, color=colour
        )
    axes[0].plot(edges, np.exp(-(edges**2) / 2) / np.sqrt(2 * np.pi), color="0.5", lw=0.8, ls="--", label="Gaussian")
    axes[0].set(
        yscale="log", ylim=(1e-5, 2), xlabel="weight / RMS (beyond the ends: in the last bin)", ylabel="density"
    )
    axes[0].set_title(name)
    axes[0].legend(frameon=False)
    before, after = np.array(list(mu.values())).T
    axes[1].plot(before, "o", color="#d1495b", ms=4, label="original")
    axes[1].plot(after, "o", color="#2e6f95", ms=4, label="rotated")
    axes[1].set(xlabel="matrix, in the order of the forward pass", ylabel="μ of the weight", ylim=(0, None))
    axes[1].legend(frameon=False)
    for h, label, colour in ((hessian, "original", "#d1495b"), (turned, "rotated", "#2e6f95")):
        axes[2].semilogy(np.diagonal(h) / np.mean(np.diagonal(h)), ".", ms=3, color=colour, label=label)
    axes[2].set(xlabel="input channel", ylabel="diagonal of H / its mean")
    axes[2].legend(frameon=False)
    plt.show()
