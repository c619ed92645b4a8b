#!/usr/bin/env bash
# What: without ref_model, DPOTrainer does not take the model it is given as the reference: it loads the weights anew from
#       the folder that the model came from. If the weights were changed in memory (adapters merged, embeddings
#       resized or averaged), training starts with a loss other than ln 2 and pulls towards the old weights.
# Versions: trl 1.16.0, transformers 5.23.0, torch 2.13.0 (CPU).
# Source: DPOTrainer.__init__ in trl/trainer/dpo_trainer.py calls create_model_from_path(get_config_model_id(config)); its
#         docstring says that the reference is the model before training starts.
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
for change in (0.0, 0.2):
    model = LlamaForCausalLM.from_pretrained("model")
    with torch.no_grad():
        for p in model.parameters():
            p += change * torch.randn_like(p)
    found[change] = first_loss(model)
    print(f"weights changed in memory by {change}: loss before the first step {found[change]:.4f} (ln 2 is 0.6931)")
same = abs(found[0.0] - 0.693147) < 1e-4 and abs(found[0.2] - 0.693147) > 0.01
print("unchanged" if same else "CHANGED")
raise SystemExit(not same)
PY
HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 venv/bin/python -W ignore check.py 2> errors || { cat errors; exit 1; }
