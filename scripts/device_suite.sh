# What gpu_suite.sh and tpu_suite.sh share; to be sourced from the repository's root.

# device_suite PLATFORM FOLDER
device_suite() {
  local python="${PYTHON:-python3}" paths="$PWD"
  # Annotations need jaxtyping; where it is not installed, a stand-in without checks does.
  "$python" -c 'import jaxtyping' 2>/dev/null || paths="$PWD:$PWD/scripts/stand_ins"
  export PYTHONPATH="$paths${PYTHONPATH:+:$PYTHONPATH}" JAX_PLATFORMS="$1"
  # Memory is taken as it is needed: tests and benchmarks are two processes.
  export XLA_PYTHON_CLIENT_PREALLOCATE=false
  local marker=gpu bad=0
  [[ "$1" == tpu ]] && marker=tpu
  "$python" -c 'import jax; print("device:", jax.devices()[0].device_kind, "jax", jax.__version__)'
  # A TPU belongs to one process; a GPU compiles side by side in several.
  local processes=1
  [[ "$1" == cuda ]] && processes=$(($(nproc) > 15 ? 7 : ($(nproc) + 1) / 2))
  "$python" -m pallas_kernels.bench --out "$2/kernels.json" --seconds "${SECONDS_LIMIT:-500}" \
    --processes "${PROCESSES:-$processes}" ${TUNE:+--tune} || bad=1
  # The tests on the device as well, where there is pytest; the benchmark's own checks cover the same kernels.
  if "$python" -c 'import pytest, hypothesis, beartype' 2>/dev/null; then
    timeout 300 "$python" -m pytest -q -n 0 -m "$marker" tests/pallas_kernels || bad=1
  fi
  return "$bad"
}
