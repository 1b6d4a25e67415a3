#!/usr/bin/env bash
# safetensors 0.8.0 with ml_dtypes 0.6.0: `safetensors.numpy.save` takes bfloat16 and 8-bit floats, and `load` of the
# same bytes raises KeyError with the name of the type in the header.
#
# The file is right (its header and bytes are those of the format, other readers take it); only the NumPy reader has no
# entry for the types that ml_dtypes adds to NumPy. Who writes a bfloat16 checkpoint from NumPy has to read it by the
# header and the offsets, or through a framework.
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check safetensors==0.8.0 ml_dtypes==0.6.0 numpy==2.2.6

found="$("$folder/venv/bin/python" - <<'PY'
import json

import ml_dtypes
import numpy as np
from safetensors.numpy import load, save

for name in ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"):
    dtype = np.dtype(name) if name == "float16" else np.dtype(getattr(ml_dtypes, name))
    data = save({"x": np.asarray([1, 2], np.float32).astype(dtype)})
    size = int.from_bytes(data[:8], "little")
    stored = json.loads(data[8 : 8 + size])["x"]["dtype"]
    same = data[8 + size :] == np.asarray([1, 2], np.float32).astype(dtype).tobytes()
    try:
        read = str(load(data)["x"].dtype)
    except KeyError as error:
        read = f"KeyError {error}"
    print(f"{name}: stored as {stored}, bytes right: {same}, read: {read}")
PY
)"
expected="float16: stored as F16, bytes right: True, read: float16
bfloat16: stored as BF16, bytes right: True, read: KeyError 'BF16'
float8_e4m3fn: stored as F8_E4M3, bytes right: True, read: KeyError 'F8_E4M3'
float8_e5m2: stored as F8_E5M2, bytes right: True, read: KeyError 'F8_E5M2'
float8_e8m0fnu: stored as F8_E8M0, bytes right: True, read: KeyError 'F8_E8M0'"
printf '%s\n' "$found"
[[ "$found" == "$expected" ]] || { printf 'this has changed; seen before:\n%s\n' "$expected" >&2; exit 1; }
