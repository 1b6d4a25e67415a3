#!/usr/bin/env bash
# jax 0.10.2 (CPU): a loop that feeds a function its own result compiles it once, under shard_map over one device twice.
#
# The first call gets an array of the host, which lies nowhere yet. What a mapped function returns lies on its mesh, also
# where the mesh has one device, and an argument that lies on a mesh is another program to jit than the same array
# without one: same shapes, same dtypes, compiled again at the second call. Who writes one code for one and for many
# devices, with shard_map around everything, pays for the largest program twice on a laptop; leaving shard_map out where
# the mesh has one device, or putting the first argument on the mesh as well, halves it.
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.2.6

cat > "$folder/loop.py" <<'PY'
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
)
mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
everywhere = PartitionSpec()


def step(total, x):
    return total + jnp.sum(x * x)


def mapped(total, x):
    return jax.shard_map(step, mesh=mesh, in_specs=(everywhere, everywhere), out_specs=everywhere)(total, x)


def programs(function, total):
    before = len(compiled)
    run = jax.jit(lambda total, x: function(total, x))  # of its own, so that nothing is found in the cache
    for _ in range(3):
        total = run(total, np.ones(4, np.float32))
    total.block_until_ready()
    return len(compiled) - before


zero = np.float32(0)
print("plain:", programs(step, zero))
print("shard_map over one device:", programs(mapped, zero))
print("the same, begun on the mesh:", programs(mapped, jax.device_put(zero, NamedSharding(mesh, everywhere))))
PY

found="$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/loop.py")"
expected="plain: 1
shard_map over one device: 2
the same, begun on the mesh: 1"
printf '%s\n' "$found"
[[ "$found" == "$expected" ]] || { printf 'this has changed; seen before:\n%s\n' "$expected" >&2; exit 1; }
