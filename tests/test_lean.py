"""Training needs only torch and numpy: packages that only read settings or show progress may be missing, as on a
machine with a GPU and no network."""

import subprocess
import sys
from pathlib import Path

import numpy as np

# packages that pip installs with fastgpt, needed only by the command line, the console or text data
ABSENT = ("safetensors", "tqdm", "matplotlib", "tokenizers", "tiktoken", "yaml", "rich", "pynvml")
BLOCK = f"""
from importlib.machinery import PathFinder

usual = PathFinder.find_spec

def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in {ABSENT} else usual(name, path, target)

PathFinder.find_spec = classmethod(find_spec)
"""
RUN = """
import sys
from fastgpt import train
from fastgpt.training.config import TrainConfig
from fastgpt.models.config import ModelConfig

model = ModelConfig(n_layers=1, n_heads=2, width=32, block_size=16)
for steps in (3, 5):
    assert train.train(TrainConfig(
        model, data="tokens.bin", out="run", device="cpu", block_size=16, micro_batch=2, batch_tokens=32,
        max_steps=steps, warmup_steps=1, eval_every=2, eval_batches=1,
    )) == 0
"""


def test_a_run_and_its_resume_without_what_pip_brings(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 100, 2000, dtype=np.uint16)
    ids.tofile(tmp_path / "tokens.bin")
    done = subprocess.run([sys.executable, "-c", BLOCK + RUN], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resumed at step 3 of 5" in done.stdout and "matplotlib is not installed" in done.stdout
    assert done.stderr.count("no progress bar: tqdm is not installed") == 1
    assert "Traceback" not in done.stderr
