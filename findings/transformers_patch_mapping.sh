#!/usr/bin/env bash
# What: register_patch_mapping of transformers calls a key an exact class name, and searches it as a pattern in every
#       name as well: a mapping for GemmaModel also replaces PaliGemmaModel. Anchors (^GemmaModel$) prevent it.
# Versions: transformers 5.23.0, torch 2.13.0.
# Source: found while registering fastgpt's models.
# Date: 2026-11-30. Exit code: 0 while it behaves like this, 1 once it does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
python=$work/venv/bin/python
"$python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy transformers==5.23.0
cat > mapping.py <<'PY'
import sys
from transformers import GemmaModel
from transformers.models.gemma import modeling_gemma
from transformers.models.paligemma import modeling_paligemma
from transformers.monkey_patching import apply_patches, clear_patch_mapping, register_patch_mapping

class Mine(GemmaModel):
    pass

found = []
for key in ("GemmaModel", "^GemmaModel$"):
    register_patch_mapping({key: Mine})
    with apply_patches():
        found.append((modeling_gemma.GemmaModel is Mine, modeling_paligemma.PaliGemmaModel is Mine))
    clear_patch_mapping()
    print("{!r}: GemmaModel replaced {}, PaliGemmaModel replaced {}".format(key, *found[-1]))
unchanged = found == [(True, True), (True, False)]
print("unchanged" if unchanged else "CHANGED")
sys.exit(not unchanged)
PY
"$python" mapping.py
