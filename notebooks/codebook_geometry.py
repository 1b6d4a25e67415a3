# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
# ---
# %% [markdown]
# # The geometry of E8P and of a trellis
#
# Coding several weights at once beats coding them one by one: the cells of a good lattice are rounder than cubes,
# and a trellis has high dimension at low cost. How close each comes to the best possible error of a Gaussian source
# of variance 1 at R bits per weight, `4^-R` (Shannon's bound), is measured at the end.

# %%
import jax
import jax.numpy as jnp
import numpy as np

import qjax
from qjax.codebooks.e8p import e8p_magnitudes

try:
    import matplotlib.pyplot as plt
except ImportError:  # the numbers need no figure: pip install -e '.[plots]' in a clone of qjax
    plt = None

# %% [markdown]
# ## E8P: 256 sources of 65,536 points
# All points lie in `E8 + ¼` or its mirror image. A code has 16 bits for 8 weights: 8 choose a *source*, a vector of
# magnitudes, 7 choose signs (parity fixes the eighth), 1 chooses the shift by +¼ or −¼. The sources are all 227
# vectors with entries in {½, 3/2, 5/2} and squared norm at most 10, and 29 of the 56 with squared norm 12 that have
# five entries 3/2 and three ½.

# %%
sources = e8p_magnitudes()
norms, counts = np.unique(np.sum(sources**2, axis=1), return_counts=True)
for norm, count in zip(norms, counts, strict=True):
    print(f"squared norm {norm:4.0f}: {count:3d} sources")
inside = int(np.sum(counts[norms <= 10]))
print(f"{inside} inside the ball, {len(sources) - inside} on the next shell")

# %%
e8p = qjax.codebooks.make("e8p", 2)
points = np.asarray(e8p.dequantize(jnp.arange(2**16, dtype=jnp.uint16).reshape(-1, 1)))
distinct = len(np.unique(points, axis=0))
shifted = [points + shift for shift in (-0.25, 0.25)]  # every point is in half-integers plus ¼, or minus ¼
halves = [np.all(np.mod(s, 1) == 0.5, axis=1) for s in shifted]
even = [np.mod(s.sum(axis=1), 2) == 0 for s in shifted]
lattice = (halves[0] & even[0]) | (halves[1] & even[1])
back = np.asarray(e8p.quantize(jnp.asarray(points)))[:, 0]
own = bool((back == np.arange(2**16)).all())
print(f"{distinct} distinct points; in E8 + ¼ or E8 − ¼: {lattice.all()}; each is its own nearest: {own}")
print(f"RMS of a coordinate {np.sqrt(np.mean(points**2)):.5f}")

# %% [markdown]
# ## A trellis: one new symbol, a state of L bits
# A bitshift trellis keeps the last L bits of the stream as its state: with K = 2 bits per weight a state has 4
# successors, which share its low L − 2 bits. The state *is* the value, through a hash that looks random (1MAD: one
# multiply-add and the sum of four bytes), so nothing is stored. With L = 6 there are 64 states and every path is
# still drawable; the library goes up to L = 16. A tile of 256 weights is one closed walk of 256 steps.

# %%
L, K = 6, 2
small = qjax.codebooks.make("trellis", K, L=L)
values = np.asarray(small.values())[:, 0]
state = np.arange(2**L)
successors = ((state[:, None] << K) & (2**L - 1)) | np.arange(2**K)  # drop the oldest K bits, add K new ones
tile = jax.random.normal(jax.random.key(0), (16, 16)) * small.rms
codes = small.quantize(tile)
path = np.asarray(small.states(codes))[0, 0]
steps_ok = all(path[(t + 1) % 256] in successors[path[t]] for t in range(256))
decoded = np.asarray(small.dequantize(codes))
values_ok = np.array_equal(decoded.ravel(), values[path])
print("every step follows an edge, the last back to the first:", steps_ok)
print("the weights are the values of the states on the path:", values_ok)

# %% [markdown]
# ## Neighbouring weights may not take any two values
# Two successive values of the trellis share L − K bits, so only some pairs exist: 2^(L+K) of the 2^(2L). That is
# the price of 2 bits per weight, and the hash spreads the pairs over the plane with little visible structure.

# %%
pairs = np.stack([np.repeat(values, 2**K), values[successors].ravel()], axis=1)
print(f"{len(pairs)} pairs of states for two weights, of {4**L}")

# %% [markdown]
# ## Distortion of a Gaussian beside the bound

# %%
books = {
    "half-integer grid": qjax.codebooks.make("half_integer", 2),
    "Lloyd–Max": qjax.codebooks.make("lloyd_max", 2),
    "D4": qjax.codebooks.make("d4", 2),
    "E8P": e8p,
    "trellis, L=6": small,
    "trellis, L=8": qjax.codebooks.make("trellis", 2, L=8),
    "trellis, L=10": qjax.codebooks.make("trellis", 2, L=10),
}
source = jax.random.normal(jax.random.key(1), (256, 512))
bound = 4.0**-2
mse = {}
for label, book in books.items():
    x = source * jnp.float32(book.rms)
    error = book.dequantize(book.quantize(x)) - x
    mse[label] = float(jnp.mean(jnp.square(error))) / book.rms**2
    print(
        f"{label:18s} mean squared error {mse[label]:.4f}, {10 * np.log10(mse[label] / bound):.2f} dB above the bound"
    )

# %% [markdown]
# With 64 states the trellis is worse than plain rounding: the 64 values that the formula gives have neither mean
# zero nor the shape of a Gaussian, and there are few paths. Every two bits more come closer to the bound; L = 16
# reaches 0.0694 (README).

# %%
if plt:
    figure, axes = plt.subplots(2, 2, figsize=(11, 9.5), layout="constrained")
    plane = np.unique(points[:, :2], axis=0)
    axes[0, 0].scatter(*plane.T, s=6, color="0.75", label="first two coordinates of all points")
    slice_of = np.all(points[:, 2:] == np.float32(0.75), axis=1)
    axes[0, 0].scatter(*points[slice_of][:, :2].T, s=32, color="#d1495b", label="those whose other six are ¾")
    axes[0, 0].set(title="E8P: projection and a slice", aspect="equal", xlabel="coordinate 0", ylabel="coordinate 1")
    axes[0, 0].legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    for s in state:
        for t in successors[s]:
            axes[0, 1].plot([0, 1], [values[s], values[t]], color="0.8", lw=0.4, zorder=0)
    axes[0, 1].scatter(np.zeros(2**L), values, c=values, cmap="RdBu", s=14)
    axes[0, 1].scatter(np.ones(2**L), values, c=values, cmap="RdBu", s=14)
    for t in range(4):
        ends = values[path[t]], values[path[t + 1]]
        axes[0, 1].plot([0, 1], ends, lw=1.6, label=f"step {t}: {path[t]:06b} → {path[t + 1]:06b}")
    axes[0, 1].set(title="trellis, L = 6: 64 states, 4 edges from each", xticks=[0, 1], ylabel="value of the state")
    axes[0, 1].set_xticklabels(["weight t", "weight t + 1"])
    axes[0, 1].legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2)
    axes[1, 0].scatter(*pairs.T, s=10, color="#2e6f95")
    axes[1, 0].set(
        title="values of two successive weights: 256 pairs", aspect="equal", xlabel="weight t", ylabel="weight t + 1"
    )
    height = np.arange(len(mse))
    axes[1, 1].barh(height, list(mse.values()), color="#2e6f95")
    axes[1, 1].axvline(bound, color="#d1495b", lw=1.5)
    axes[1, 1].text(bound + 0.001, len(mse) - 0.5, "Shannon bound 1/16", color="#d1495b", va="top")
    axes[1, 1].set_yticks(height, list(mse))
    axes[1, 1].set_ylim(len(mse) + 0.1, -0.6)
    axes[1, 1].set(title="2 bits per weight, Gaussian source", xlabel="mean squared error")
    plt.show()
