# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # LDLQ by hand
#
# Rounding a row w to ŵ costs `(w − ŵ) H (w − ŵ)ᵀ`. LDLQ rounds the columns one after the other and lets every
# column make up for the errors of the ones before it. Here it is written out on a small H, and compared bit for bit
# with the library's.

# %%
import jax.numpy as jnp
import numpy as np

import qjax
from qjax.linalg import damped_factor

try:
    import matplotlib.pyplot as plt
except ImportError:  # the numbers need no figure: pip install -e '.[plots]' in a clone of qjax
    plt = None

rng = np.random.default_rng(0)
n, rows = 8, 64
mixing = rng.standard_normal((n, n)) * np.exp(-np.arange(n) / 3)[:, None]
x = rng.standard_normal((1000, n)) @ mixing  # correlated inputs
hessian = (x.T @ x / len(x)).astype(np.float32)
weight = rng.standard_normal((rows, n)).astype(np.float32)
codebook = qjax.codebooks.make("half_integer", 2)  # levels −3/2, −1/2, 1/2, 3/2

# %% [markdown]
# ## The feedback
# `H = L D Lᵀ` with L unit lower triangular. For an error E the loss is `tr(E H Eᵀ) = Σ_k D_k ‖(E L)_k‖²`: column k
# of E L is `e_k + Σ_{j>k} e_j L_jk`. Going from the last column to the first, the e_j of that sum are known, and
# rounding `w_k + Σ_{j>k} e_j L_jk` in place of w_k leaves only the rounding's own residual, which no choice of
# feedback can avoid.

# %%
factor = damped_factor(jnp.asarray(hessian), 0.01)  # H over its mean diagonal, plus 0.01 I
lower, pivots = np.asarray(factor.lower, np.float64), np.asarray(factor.diagonal, np.float64).ravel()
print("L, the feedback of column j (row) to column k (column):")
print(np.array2string(lower, precision=2, suppress_small=True))

# %%
levels = np.arange(4) - 1.5


def nearest(values):
    return levels[np.argmin(np.abs(values[:, None] - levels[None]), axis=1)]


by_hand = np.zeros_like(weight, dtype=np.float64)
for k in reversed(range(n)):
    error = weight[:, k + 1 :] - by_hand[:, k + 1 :]
    by_hand[:, k] = nearest(weight[:, k] + error @ lower[k + 1 :, k])

# %% [markdown]
# ## The same from the library

# %%
results = {
    name: qjax.rounding.make(name)(jnp.asarray(weight), qjax.Hessian(jnp.asarray(hessian)), codebook, damping=0.01)
    for name in ("nearest", "ldlq", "gptq")
}
same_ldlq = np.array_equal(by_hand, results["ldlq"].values)
print("by hand equals qjax's LDLQ, entry for entry:", same_ldlq)

# %% [markdown]
# ## Where the loss goes
# `tr(E H Eᵀ) = tr(η D ηᵀ)` with `η = E L`, the residuals. Inside the range of the grid they are at most ½ in size,
# however large E gets. (H here is the damped, normalised one that was factored.)

# %%
damped = lower @ np.diag(pivots) @ lower.T
losses, residuals, errors = {}, {}, {}
for name, result in results.items():
    errors[name] = weight - np.asarray(result.values, np.float64)
    residuals[name] = errors[name] @ lower
    losses[name] = float(np.trace(errors[name] @ damped @ errors[name].T))
    sizes = np.sum(errors[name] ** 2), np.sum(residuals[name] ** 2)
    print(f"{name:8s} tr(E H Eᵀ) = {losses[name]:7.3f}   ‖E‖² = {sizes[0]:7.2f}   ‖E L‖² = {sizes[1]:7.2f}")
identity_holds = np.isclose(losses["ldlq"], np.sum(pivots * np.sum(residuals["ldlq"] ** 2, axis=0)))
print("tr(E H Eᵀ) = tr(η D ηᵀ):", identity_holds)

# %% [markdown]
# ## GPTQ is LDLQ
# GPTQ goes from the first column to the last and updates all that remain with the Cholesky factor of the *inverse*
# Hessian. Its feedback is the LDL factor of H with the order of the columns reversed, so GPTQ on (W, H) is LDLQ on
# both flipped. That their losses above differ is the order alone: which columns come last, and so have no error
# left to make up for.

# %%
flipped = qjax.rounding.make("ldlq")(
    jnp.asarray(weight[:, ::-1].copy()), qjax.Hessian(jnp.asarray(hessian[::-1, ::-1].copy())), codebook, damping=0.01
)
same_gptq = np.array_equal(np.asarray(flipped.values)[:, ::-1], results["gptq"].values)
print("GPTQ equals LDLQ with the columns reversed, entry for entry:", same_gptq)

# %%
if plt:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    image = axes[0].imshow(np.where(np.tri(n, k=-1) > 0, lower, np.nan), cmap="RdBu", vmin=-1.5, vmax=1.5)
    axes[0].set(title="feedback: L below its diagonal")
    axes[0].set(xlabel="column k that is corrected", ylabel="column j rounded before")
    figure.colorbar(image, ax=axes[0], shrink=0.8)
    axes[1].bar(np.arange(n), pivots, color="#2e6f95", width=0.8, label="D: after feedback")
    axes[1].plot(np.arange(n), np.diagonal(damped), "o", color="#d1495b", label="diagonal of H: without")
    axes[1].set(title="what a unit error costs in each column", xlabel="column", yscale="log", ylim=(0.03, 12))
    axes[1].legend(frameon=False, loc="upper left")
    for name, colour in (("nearest", "#d1495b"), ("ldlq", "#2e6f95")):
        by_row = np.einsum("ij,jk,ik->i", errors[name], damped, errors[name])
        axes[2].hist(by_row, np.linspace(0, 4, 25), color=colour, alpha=0.6, label=name)
    axes[2].set(title="loss of each of the 64 rows", xlabel="(w − ŵ) H (w − ŵ)ᵀ", ylabel="rows")
    axes[2].legend(frameon=False)
    plt.show()
