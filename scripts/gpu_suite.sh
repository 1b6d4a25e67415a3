#!/usr/bin/env bash
# Kernel checks and benchmarks on a machine with an NVIDIA GPU. Needs a python with jax[cuda], no network, 9 minutes.
#
#   scripts/gpu_suite.sh [FOLDER]     writes FOLDER/kernels.json (default benchmarks/results/gpu)
#
# PYTHON names the interpreter, SECONDS_LIMIT the time (500), TUNE=1 tries block sizes first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/device_suite.sh
device_suite cuda "${1:-benchmarks/results/gpu}"
