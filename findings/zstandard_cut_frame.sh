#!/usr/bin/env bash
# What: a zstandard frame that is cut in the middle is read without an error, like a whole but shorter one, by
#       zstandard.open, stream_reader, read_to_iter and copy_stream. Python's gzip raises EOFError on such a file. Of two
#       frames after each other, read_to_iter and decompress return the first one only, also without an error.
# Versions: zstandard 0.25.0.
# Source: found while reading .jsonl.zst dumps whose download had broken off.
# Date: 2026-11-29. Exit code: 0 while it behaves like this, 1 once it does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
python=$work/venv/bin/python
"$python" -m pip install --quiet --no-compile --disable-pip-version-check zstandard==0.25.0
cat > cut.py <<'PY'
import gzip, io, sys
import zstandard

lines = b"".join(b"line %d\n" % (i * i) for i in range(200_000))
cut = zstandard.compress(lines)
cut = cut[: len(cut) // 2]

def copied(data):
    out = io.BytesIO()
    zstandard.ZstdDecompressor().copy_stream(io.BytesIO(data), out)
    return out.getvalue()

ways = {
    "open": lambda data: zstandard.open(io.BytesIO(data), "rb").read(),
    "stream_reader": lambda data: zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)).read(),
    "read_to_iter": lambda data: b"".join(zstandard.ZstdDecompressor().read_to_iter(io.BytesIO(data))),
    "copy_stream": copied,
}
print("zstandard", zstandard.__version__)
print("a cut frame is read without an error; gzip raises one")
silent = True
for name, read in ways.items():
    got = read(cut)
    print(f"{name}: {len(got):,} of {len(lines):,} bytes, no error")
    silent &= 0 < len(got) < len(lines)
packed = gzip.compress(lines)
try:
    gzip.decompress(packed[: len(packed) // 2])
    silent = False
except EOFError as e:
    print("gzip: EOFError:", e)
two = zstandard.compress(b"one") + zstandard.compress(b"two")
ways["decompress"] = lambda data: zstandard.ZstdDecompressor().decompress(data)
got = {name: read(two) for name, read in ways.items()}
print("two frames:", got)
silent &= got["read_to_iter"] == got["decompress"] == b"one" and got["open"] == got["stream_reader"] == b"onetwo"
print("unchanged" if silent else "CHANGED")
sys.exit(not silent)
PY
"$python" cut.py
