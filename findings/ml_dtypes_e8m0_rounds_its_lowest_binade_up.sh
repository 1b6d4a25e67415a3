#!/usr/bin/env bash
# ml_dtypes 0.6.0, float32 -> float8_e8m0fnu: everything strictly between 2^-127 and 2^-126 becomes 2^-126, even
# 1.016 * 2^-127. In every other binade the nearer power of two is taken (1.25 * 2^-100 becomes 2^-100).
#
# 2^-127 is subnormal in float32 and the lowest value of E8M0. An oracle for scales of MX blocks that compares with this
# cast has to leave the binade out.
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check ml_dtypes==0.6.0 numpy==2.2.6

found="$("$folder/venv/bin/python" - <<'PY'
import ml_dtypes
import numpy as np

for factor, exponent in ((1.0, -127), (1.016, -127), (1.25, -127), (1.25, -126), (1.25, -100), (1.75, -100)):
    value = np.ldexp(np.float32(factor), exponent).astype(np.float32)
    code = int(value.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8))
    print(f"{factor} * 2^{exponent} -> 2^{code - 127}")
PY
)"
expected="1.0 * 2^-127 -> 2^-127
1.016 * 2^-127 -> 2^-126
1.25 * 2^-127 -> 2^-126
1.25 * 2^-126 -> 2^-126
1.25 * 2^-100 -> 2^-100
1.75 * 2^-100 -> 2^-99"
printf '%s\n' "$found"
[[ "$found" == "$expected" ]] || { printf 'this has changed; seen before:\n%s\n' "$expected" >&2; exit 1; }
