#!/usr/bin/env bash
# auto-round 0.16.1 (auto_round_extension.torch.qlinear_torch.QuantLinear, torch 2.13.0 on a CPU): a GPTQ layer with
# `g_idx` (g_idx=True, as files with an activation order need) takes the first `infeatures` columns of the decoded matrix
# for the whole. With more outputs than inputs the product fails on its shape; with as many or fewer it is right, so
# square layers hide it.
#
# Its layers are a handy oracle on a CPU for GPTQ's layout; for matrices that are not square leave `g_idx` out (the order
# is then that of the inputs).
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 auto-round==0.16.1

found="$("$folder/venv/bin/python" - 2>"$folder/log" <<'PY'
import torch
from auto_round_extension.torch.qlinear_torch import QuantLinear


def layer(inputs, outputs, order):
    """Codes and zeros of 4 bits that count up, scales of 1, groups of 32 inputs."""
    made = QuantLinear(4, 32, inputs, outputs, bias=False, g_idx=order)
    codes = torch.arange(inputs * outputs).reshape(inputs, outputs) % 16
    shifts = 4 * torch.arange(8)
    words = (codes.reshape(-1, 8, outputs) << shifts[None, :, None]).sum(1)
    made.qweight = (words - ((words >> 31) << 32)).to(torch.int32)
    made.qzeros = torch.zeros_like(made.qzeros)
    made.scales = torch.ones_like(made.scales)
    if order:
        made.g_idx = (torch.arange(inputs) // 32).to(torch.int32)
    getattr(made, "post_init", lambda: None)()
    return made, codes.float()


for inputs, outputs in ((64, 64), (64, 32), (64, 128)):
    for order in (False, True):
        made, codes = layer(inputs, outputs, order)
        if not order and hasattr(made, "g_idx"):
            del made.g_idx
        try:
            y = made(torch.eye(inputs))
            said = f"right: {bool((y == codes).all())}"
        except RuntimeError as error:
            said = f"RuntimeError: {str(error)[:9]}"
        print(f"{inputs} -> {outputs}, g_idx {order}: {said}")
PY
)" || { tail -5 "$folder/log" >&2; exit 1; }
expected="64 -> 64, g_idx False: right: True
64 -> 64, g_idx True: right: True
64 -> 32, g_idx False: right: True
64 -> 32, g_idx True: right: True
64 -> 128, g_idx False: right: True
64 -> 128, g_idx True: RuntimeError: shape '[6"
printf '%s\n' "$found"
[[ "$found" == "$expected" ]] || { printf 'this has changed; seen before:\n%s\n' "$expected" >&2; exit 1; }
