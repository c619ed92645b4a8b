"""Weights in and out: between fastgpt.models.gpt.GPT and the files of other projects.

    model = load_pretrained(folder)             a GPT from config.json and safetensors (or .bin) in a folder
    save_pretrained(model, folder)              a folder that transformers loads, from a GPT
    weights = open_pretrained(folder)           checked but not read yet: weights.config, weights.read(name)
    family_of(config), family_for(ModelConfig)  the family of a config.json, or one that hosts a model

Families: GPT-2, GPT-Neo, GPT-J, GPT-NeoX, Llama (Meta's own files too), Mistral, Qwen2, Qwen3. Each is a table of names
(gpt_families.py, llama_families.py, meta_llama.py) over a few layouts (layouts.py); files.py reads and writes the
files, convert.py goes between. gguf.py, nanogpt.py and llmc.py write the forms of other projects.
Every error is a UserError of one sentence. Nothing is unpickled but tensors, and no more than one parameter at a time
is in memory besides the model that is loaded.
"""

from fastgpt.models.weights.convert import Weights
from fastgpt.models.weights.families import FAMILIES, family_for, family_of
from fastgpt.models.weights.huggingface import load_pretrained, open_pretrained, save_pretrained, write_pretrained

__all__ = [
    "FAMILIES",
    "Weights",
    "family_for",
    "family_of",
    "load_pretrained",
    "open_pretrained",
    "save_pretrained",
    "write_pretrained",
]
