#!/usr/bin/env bash
# What: a gigatoken encoder keeps every word that it has met. Its memory grows with the number of distinct words and is
#       returned only when the encoder is deleted, so one encoder used for a whole corpus of URLs, hashes and
#       identifiers grows to gigabytes. tiktoken's memory stays flat on the same text.
# Versions: gigatoken 0.10.0, tiktoken 0.14.0.
# Source: found while encoding long texts for a data set; neither page says so.
# Date: 2026-11-29. Exit code: 0 while the two behave like this, 1 once they do not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
python=$work/venv/bin/python
"$python" -m pip install --quiet --no-compile --disable-pip-version-check gigatoken==0.10.0 tiktoken==0.14.0 \
  tokenizers==0.23.3 psutil==7.2.2 numpy
cat > grow.py <<'PY'
import gc, sys
from importlib.metadata import version
import gigatoken, numpy as np, psutil, tiktoken
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
bpe.train_from_iterator(["some words to train on"], trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet))

def megabytes():
    gc.collect()
    return psutil.Process().memory_info().rss / 1e6

def text(rng):  # 200,000 distinct words of 8 letters: 1.8 MB
    letters = rng.integers(97, 123, (200_000, 9)).astype(np.uint8)
    letters[:, 8] = 32
    return letters.tobytes().decode()

def growth(encode, label):
    rng, start, seen = np.random.default_rng(0), megabytes(), []
    for i in range(60):
        encode(text(rng))
        if i % 20 == 19:
            seen.append(megabytes() - start)
    print(f"{label}: {', '.join(f'{m:.0f} MB' for m in seen)} more after 36, 72 and 108 MB of text", flush=True)
    return start, seen

fast = gigatoken.Tokenizer.from_json(bpe.to_str())
ranks = {bytes([b]): b for b in range(256)}
slow = tiktoken.Encoding("bytes", pat_str=r" ?\w+", mergeable_ranks=ranks, special_tokens={})
print("gigatoken", version("gigatoken"), "tiktoken", version("tiktoken"))
print("gigatoken keeps every distinct word until the encoder is deleted; tiktoken keeps none")
_, flat = growth(slow.encode_to_numpy, "tiktoken ")
start, grown = growth(fast.encode, "gigatoken")
del fast
after = megabytes() - start
print(f"gigatoken: {after:.0f} MB more once the encoder is deleted")
unchanged = flat[-1] < 50 < 200 < grown[0] < grown[1] - 100 and after < grown[-1] / 3
print("unchanged" if unchanged else "CHANGED")
sys.exit(not unchanged)
PY
"$python" grow.py
