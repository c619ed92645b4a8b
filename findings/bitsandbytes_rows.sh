#!/usr/bin/env bash
# What: on a CPU with AVX-512, bitsandbytes restores a matrix in 4 bits wrongly if its rows are no multiple of the block
#       size, without an error: (96, 32) in blocks of 64 comes back 40 % off, where the nearest levels are 9 % off. The
#       packed bytes are right: the same matrix quantised in rows of 64, which packs the same bytes, comes back right.
# Versions: bitsandbytes 0.50.2, torch 2.13.0.
# Source: found while quantising the base of an adapter; pull requests 1828 and 1884 of bitsandbytes mend other cases.
# Date: 2026-11-29. Exit code: 0 while it behaves like this or on a CPU without AVX-512, 1 once it does not.
set -euo pipefail
if ! grep -q avx512f /proc/cpuinfo; then
  echo "not applicable: this CPU has no AVX-512"
  exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
python=$work/venv/bin/python
"$python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy bitsandbytes==0.50.2
cat > rows.py <<'PY'
import sys
import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit

levels = get_4bit_type("nf4", device="cpu")

def error(got, w):
    return float((got - w).norm() / w.norm())

found = {}
for shape in ((128, 64), (96, 32), (64, 96), (96, 160)):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    blocks = w.view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = (levels[((blocks / scale)[..., None] - levels).abs().argmin(-1)] * scale).view(shape)
    packed, state = quantize_4bit(w, blocksize=64, quant_type="nf4")
    other, by_block = quantize_4bit(blocks, blocksize=64, quant_type="nf4")
    found[shape] = (
        error(dequantize_4bit(packed, state), w), error(dequantize_4bit(other, by_block).view(shape), w),
        error(nearest, w), torch.equal(packed, other),
    )
    print("{}: restored {:.3f} off, in rows of 64 {:.3f}, nearest levels {:.3f}; same bytes: {}".format(shape, *found[shape]))
right = all(rows < 0.1 and nearest < 0.1 and same for _, rows, nearest, same in found.values())
wrong = [shape for shape, (restored, *_) in found.items() if restored > 0.15]
unchanged = right and wrong == [(96, 32), (64, 96), (96, 160)]
print("unchanged" if unchanged else "CHANGED")
sys.exit(not unchanged)
PY
"$python" rows.py
