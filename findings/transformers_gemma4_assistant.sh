#!/usr/bin/env bash
# What: No assistant of Gemma 4 for multi-token prediction can be built. Gemma4AssistantConfig requires that all layers
#       share keys and values (num_kv_shared_layers == num_hidden_layers) and sets that itself; each layer of the model
#       asks the text config which layers share, and that refuses unless every kind of layer has one that does not.
# Versions: transformers 5.23.0, torch 2.13.0.
# Source: found while patching every causal language model of transformers.
# Date: 2026-11-30. Exit code: 0 while it behaves like this, 1 once it does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
python=$work/venv/bin/python
"$python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy transformers==5.23.0
cat > assistant.py <<'PY'
import sys
import transformers

tiny = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, global_head_dim=16, vocab_size=64, vocab_size_per_layer_input=0, hidden_size_per_layer_input=0)
found = []
for name, kinds in (("Gemma4", {}), ("Gemma4Unified", {}), ("Gemma4", dict(layer_types=["full_attention"] * 4))):
    extra = {k: v for k, v in tiny.items() if "per_layer_input" not in k or name == "Gemma4"}
    text = getattr(transformers, name + "TextConfig")(**extra, **kinds)
    config = getattr(transformers, name + "AssistantConfig")(text_config=text, backbone_hidden_size=32)
    try:
        getattr(transformers, name + "AssistantForCausalLM")(config)
        found.append("")
    except ValueError as e:
        found.append(str(e))
    print("{}, {} of {} layers share: {}".format(name, text.num_kv_shared_layers, text.num_hidden_layers, found[-1] or "built"))
unchanged = all("different than the set of layer types" in f for f in found)
print("unchanged" if unchanged else "CHANGED")
sys.exit(not unchanged)
PY
"$python" assistant.py
