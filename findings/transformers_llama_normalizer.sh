#!/usr/bin/env bash
# What: a folder whose tokenizer_config.json says LlamaTokenizer gets its ids from the vocabulary and the merges of
#       tokenizer.json alone. AutoTokenizer drops the normalizer of that file without a word, so a text with a space in
#       front has other ids than `tokenizers` gives for the same file. PreTrainedTokenizerFast reads the whole file.
# Versions: transformers 5.23.0, tokenizers 0.23.3.
# Source: found while exporting tokenizers; Llama 2's own tokenizer.json has this normalizer.
# Date: 2026-11-29. Exit code: 0 while it behaves like this, 1 once it does not.
# Output seen:
#   ' a'   tokenizer.json [3, 5]  LlamaTokenizer [5]  PreTrainedTokenizerFast [3, 5]
#   '</s>a'  tokenizer.json [2, 5]  LlamaTokenizer [2, 4]  PreTrainedTokenizerFast [2, 5]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
python=$work/venv/bin/python
"$python" -m pip install --quiet --no-compile --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3
cat > ids.py <<'PY'
import json, sys
from importlib.metadata import version
from pathlib import Path
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer

vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "▁a": 5}
plain = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
plain.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
plain.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
plain.add_special_tokens(["<unk>", "<s>", "</s>"])

def load(kind):
    folder = Path(kind)
    folder.mkdir()
    plain.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return AutoTokenizer.from_pretrained(folder)

llama, fast = load("LlamaTokenizer"), load("PreTrainedTokenizerFast")
print("transformers", version("transformers"), "tokenizers", version("tokenizers"))
print("AutoTokenizer ignores the normalizer of tokenizer.json where tokenizer_config.json says LlamaTokenizer")
unchanged = True
for text in (" a", "</s>a"):
    own = plain.encode(text, add_special_tokens=False).ids
    ids = [t(text, add_special_tokens=False)["input_ids"] for t in (llama, fast)]
    print(f"{text!r:7}  tokenizer.json {own}  LlamaTokenizer {ids[0]}  PreTrainedTokenizerFast {ids[1]}")
    unchanged &= ids[1] == own != ids[0]
print("unchanged" if unchanged else "CHANGED")
sys.exit(not unchanged)
PY
"$python" ids.py
