#!/usr/bin/env bash
# jax and jaxlib 0.10.2 (CPU): with --xla_cpu_max_isa=SSE4_2 no program that widens or narrows float16 runs.
#
# The flag is XLA's own way to compile for processors without AVX. Such processors have no F16C instructions either, so
# LLVM turns the conversions into calls of compiler-rt (__extendhfsf2, __truncsfhf2), which jaxlib's linker does not
# find: the first use raises "Failed to materialize symbols", and the cause stands on standard error alone. bfloat16 and float32 work, and float16 does from AVX2 on. Who runs a
# suite at several instruction sets on one machine has to leave float16 out of the lowest column, or begin with AVX2.
set -euo pipefail
[[ "$(uname -m)" == x86_64 ]] || { echo "skipped: an x86-64 machine is needed"; exit 0; }

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.2.6

cat > "$folder/widen.py" <<'PY'
import sys

import jax
import jax.numpy as jnp
import numpy as np

x = np.arange(8).astype(sys.argv[1])
try:
    print(sys.argv[1], float(jax.jit(lambda x: jnp.sum(x.astype(jnp.float32)))(x)))
except jax.errors.JaxRuntimeError as error:
    print(sys.argv[1], "raises:", str(error).partition(":")[2].strip()[:29])
PY

run() { XLA_FLAGS="--xla_cpu_max_isa=$1" JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/widen.py" "$2" 2>"$folder/log"; }

first="$(run SSE4_2 float16)"
cause="$(grep -o '__extendhfsf2' "$folder/log" | head -n 1 || true)"
found="$(printf '%s\n' "SSE4_2: $first" "$cause" "SSE4_2: $(run SSE4_2 float32)" "AVX2: $(run AVX2 float16)")"
expected="SSE4_2: float16 raises: Failed to materialize symbols
__extendhfsf2
SSE4_2: float32 28.0
AVX2: float16 28.0"
printf '%s\n' "$found"
[[ "$found" == "$expected" ]] || { printf 'this has changed; seen before:\n%s\n' "$expected" >&2; exit 1; }
