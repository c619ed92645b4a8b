"""From text or token files to batches: corpus, tokenizer, shards, prepare, loader; each usable on its own."""

from fastgpt.data.corpus import (
    EOT,
    Corpus,
    Part,
    TextFile,
    default_corpus,
    read_text,
    read_texts,
    split_files,
    text_files,
)
from fastgpt.data.loader import IGNORE, TokenLoader, sequential
from fastgpt.data.prepare import Dataset, load_dataset, prepare, unigram_nats
from fastgpt.data.shards import ShardWriter, Tokens, open_split, open_tokens
from fastgpt.data.tokenizer import Tokenizer, train_tokenizer

__all__ = [
    "EOT",
    "IGNORE",
    "Corpus",
    "Dataset",
    "Part",
    "ShardWriter",
    "TextFile",
    "TokenLoader",
    "Tokenizer",
    "Tokens",
    "default_corpus",
    "load_dataset",
    "open_split",
    "open_tokens",
    "prepare",
    "read_text",
    "read_texts",
    "sequential",
    "split_files",
    "text_files",
    "train_tokenizer",
    "unigram_nats",
]
