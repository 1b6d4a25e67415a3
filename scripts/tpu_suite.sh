#!/usr/bin/env bash
# Kernel checks and benchmarks on a machine with a TPU. Needs a python with jax[tpu], no network, 9 minutes.
#
#   scripts/tpu_suite.sh [FOLDER]     writes FOLDER/kernels.json (default benchmarks/results/tpu)
#
# PYTHON names the interpreter, SECONDS_LIMIT the time (500), TUNE=1 tries block sizes first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/device_suite.sh
device_suite tpu "${1:-benchmarks/results/tpu}"
