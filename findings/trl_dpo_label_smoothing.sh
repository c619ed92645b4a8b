#!/usr/bin/env bash
# What: label_smoothing of DPOConfig does nothing with the default loss: "sigmoid" is plain DPO whatever it is, without a
#       warning. Only "robust" and "exo_pair" read it, and "robust" divides by 1 - 2 e, so no loss is the smoothed
#       one, -(1 - e) log sigmoid(h) - e log sigmoid(-h).
# Versions: trl 1.16.0, transformers 5.23.0, torch 2.13.0 (CPU).
# Source: DPOTrainer._compute_loss in trl/trainer/dpo_trainer.py.
# Date: 2026-11-29. Exit code: 0 while TRL behaves like this, 1 once it does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 trl==1.16.0 datasets==5.2.0
cat > check.py <<'PY'
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

print("trl", trl.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
ROWS = dict(prompt=["w3 w4", "w5 w6"], chosen=["w7 w8", "w9"], rejected=["w10", "w11 w12"])
SIZES = dict(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=32,
)
PLAIN = dict(bf16=False, use_cpu=True, gradient_checkpointing=False, report_to=[], disable_tqdm=True)


def first_loss(model, **settings):
    config = DPOConfig(output_dir="out", **PLAIN, **settings)
    trainer = DPOTrainer(model, args=config, train_dataset=Dataset.from_dict(ROWS), processing_class=tokenizer)
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader()))))


torch.manual_seed(5)
LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained("model")
found = {}
for smoothing in (0.0, 0.3):
    model = LlamaForCausalLM.from_pretrained("model")
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=g)
    torch.manual_seed(0)
    found[smoothing] = first_loss(model, label_smoothing=smoothing)
    print(f"loss 'sigmoid' with label_smoothing {smoothing}: {found[smoothing]:.6f}")
same = found[0.0] == found[0.3] and abs(found[0.0] - 0.693147) > 0.01
print("unchanged" if same else "CHANGED")
raise SystemExit(not same)
PY
HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 venv/bin/python -W ignore check.py 2> errors || { cat errors; exit 1; }
