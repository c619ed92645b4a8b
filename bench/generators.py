"""The ways to generate that `fastgpt bench generate` compares, each in a separate process.

fastgpt, with the weights in fp32, bf16 or int8; transformers' `generate` with a dynamic cache, and with a static cache
whose decode steps are compiled; llama.cpp through llama-cpp-python, in f32 and q8_0. All have the same random weights:
`write_models` writes them once, as a folder that fastgpt and transformers load and as GGUF. A further process measures
what the machine can do: the speed of reading the weights, and of the matrix products of a prefill.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from fastgpt.bench._harness import resident_mb
from fastgpt.bench.variants import Apart
from fastgpt.data import train_tokenizer
from fastgpt.inference import Generator, Request
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.models.weights import gguf, load_pretrained, save_pretrained

Tokens = list[list[int]]
MACHINE = "machine"
OWN = {"fastgpt": "fp32", "fastgpt bf16": "bf16", "fastgpt int8": "int8"}  # variant -> type of the weights
TRANSFORMERS = ("transformers", "transformers static")
LLAMA_CPP = {"llama.cpp": "fp32", "llama.cpp q8_0": "q8_0"}
DTYPES = OWN | dict.fromkeys(TRANSFORMERS, "fp32") | LLAMA_CPP


@dataclass(frozen=True)
class Shape:
    """A GPT-2 and the numbers of tokens of a prompt and of its continuation."""

    layers: int
    heads: int
    width: int
    vocab: int
    context: int
    prompt: int
    new: int

    def config(self) -> ModelConfig:
        """Return the model; its initial weights are large enough for the tokens of a continuation to differ."""
        sizes: dict[str, Any] = dict(n_layers=self.layers, n_heads=self.heads, width=self.width, init_std=0.08)
        return ModelConfig(**sizes, vocab_size=self.vocab, vocab_multiple=1, block_size=self.context)

    def prompts(self, batch: int) -> Tokens:
        """Return random prompts, (B, T) ids."""
        generator = torch.Generator().manual_seed(batch)
        ids: Tokens = torch.randint(self.vocab, (batch, self.prompt), generator=generator).tolist()
        return ids

    def product_flops(self, batch: int) -> int:
        """Return the FLOPs of the matrix products of a prefill: those of the blocks."""
        return 2 * batch * self.prompt * 12 * self.layers * self.width**2

    def prefill_flops(self, batch: int) -> int:
        """Return the FLOPs of a prefill: products, attention to earlier tokens, logits of the last token."""
        attention = 2 * self.layers * self.width * self.prompt * (self.prompt + 1)
        return self.product_flops(batch) + batch * (attention + 2 * self.width * self.vocab)

    def cache_bytes(self, batch: int, itemsize: int) -> int:
        """Return the bytes of the keys and values of a prompt and its continuation."""
        return 2 * self.layers * batch * (self.prompt + self.new) * self.width * itemsize


SHAPES = {"gpt2-124m": Shape(12, 12, 768, 50257, 1024, 128, 128), "tiny": Shape(2, 2, 64, 300, 64, 16, 8)}
WARM = Shape(1, 1, 32, 300, 16, 8, 2)  # each process runs this before its memory is measured


@dataclass(frozen=True)
class Setup:
    """What a process needs: the folder that `write_models` filled, and the number of threads."""

    shape: Shape
    folder: Path
    threads: int


def available() -> tuple[list[str], dict[str, str]]:
    """Return the variants that can run here, and for each of the others why it cannot."""
    names, absent = list(OWN), {}
    if "weights" not in inspect.signature(Generator.__init__).parameters:
        names = ["fastgpt"]
        absent = dict.fromkeys(list(OWN)[1:], "fastgpt.inference.Generator has no option for the type of weights")
    for variants, module, package in (
        (TRANSFORMERS, "transformers", "transformers"),
        (LLAMA_CPP, "llama_cpp", "llama-cpp-python"),
    ):
        if importlib.util.find_spec(module) is None:
            absent |= dict.fromkeys(variants, f"needs `pip install {package}`")
        else:
            names += variants
    return names, absent


def write_models(shape: Shape, folder: Path, names: list[str]) -> dict[str, int]:
    """Write the files that the variants load; return the model's parameters and those that a decode step reads."""
    if shape != WARM:
        write_models(WARM, folder / "warm", names)
    model = GPT(shape.config(), generator=torch.Generator().manual_seed(0)).eval()
    save_pretrained(model, folder / "hf", extra={"bos_token_id": 0, "eos_token_id": 0})
    named = dict(model.named_parameters())
    tokenizer = train_tokenizer(["only ids are used, so any text will do"], 260)
    for name in filter(LLAMA_CPP.__contains__, names):
        (folder / LLAMA_CPP[name]).mkdir()
        read = lambda name: named[name].detach()  # noqa: E731
        gguf.write(folder / LLAMA_CPP[name], model.config, read, LLAMA_CPP[name], tokenizer.text, tokenizer.eot)
    count = sum(p.numel() for p in named.values())
    return {"parameters": count, "read": count - named["wpe.weight"].numel()}  # of the positions, one row is read


class Engine(Protocol):
    """Something that generates."""

    weight_bytes: int

    def generate(self, prompts: Tokens, count: int) -> Tokens:
        """Return the `count` most likely tokens after each prompt, one after the other."""


class FastGPT:
    """fastgpt's Generator."""

    def __init__(self, name: str, setup: Setup) -> None:
        options: dict[str, Any] = {"reuse": False}  # rounds repeat their prompts
        options |= {} if OWN[name] == "fp32" else {"weights": OWN[name]}
        model = load_pretrained(setup.folder / "hf")
        self.generator = Generator(model, **options)
        model = self.generator.model
        storages = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
        self.weight_bytes = sum(
            {s.data_ptr(): s.nbytes() for s in storages}.values()
        )  # a tied head is not a second one

    def generate(self, prompts: Tokens, count: int) -> Tokens:
        requests = [Request(prompt, count, temperature=0, ignore_eos=True) for prompt in prompts]
        return [result.ids for result in self.generator.generate(requests)]


class Transformers:
    """transformers' `generate`; 'transformers static': with a static cache and compiled decode steps."""

    def __init__(self, name: str, setup: Setup) -> None:
        transformers: Any = importlib.import_module("transformers")
        transformers.utils.logging.disable_progress_bar()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(setup.folder / "hf", dtype=torch.float32).eval()
        self.weight_bytes = sum(p.nbytes for p in self.model.parameters())
        self.options: dict[str, Any] = dict(do_sample=False, pad_token_id=0)
        self.model.generation_config.eos_token_id = None
        if name == "transformers static":
            compiled = transformers.CompileConfig(mode=None, fullgraph=False, dynamic=False)
            compiled._compile_all_devices = True  # compiling on a CPU has to be asked for
            self.options |= dict(cache_implementation="static", compile_config=compiled)

    def generate(self, prompts: Tokens, count: int) -> Tokens:
        ids = torch.tensor(prompts)
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **self.options)
        new: Tokens = out[:, ids.shape[1] :].tolist()
        return new


class LlamaCpp:
    """llama.cpp's own loop: one batch with all prompts, then one token of every sequence at a time."""

    def __init__(self, name: str, setup: Setup) -> None:
        self.lib: Any = importlib.import_module("llama_cpp")
        lib = self.lib
        self.quiet = lib.llama_log_callback(lambda *arguments: None)
        lib.llama_log_set(self.quiet, None)
        path = setup.folder / LLAMA_CPP[name] / "model.gguf"
        self.model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self.shape, self.threads, self.weight_bytes = setup.shape, setup.threads, path.stat().st_size
        self.f32_cache = LLAMA_CPP[name] == "fp32"
        self.context: Any = None
        self.batch: Any = None
        self.count = 0

    def _open(self, batch: int) -> None:
        """Allocate a context for as many sequences."""
        lib = self.lib
        if self.context is not None:
            lib.llama_batch_free(self.batch)
            lib.llama_free(self.context)
        p = lib.llama_context_default_params()
        p.n_ctx, p.n_seq_max = batch * (self.shape.prompt + self.shape.new), batch
        p.n_batch = batch * self.shape.prompt
        p.n_threads = p.n_threads_batch = self.threads
        if self.f32_cache:
            p.type_k = p.type_v = lib.GGML_TYPE_F32
        self.context, self.count = lib.llama_init_from_model(self.model, p), batch
        if not self.context:
            raise RuntimeError(f"llama.cpp opens no context for {batch} sequences")
        self.batch = lib.llama_batch_init(p.n_batch, 0, 1)

    def _decode(self, tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        """Read (id, position, sequence, whether its logits are needed); return the most likely next tokens."""
        lib, b = self.lib, self.batch
        b.n_tokens = len(tokens)
        for i, (token, position, sequence, last) in enumerate(tokens):
            b.token[i], b.pos[i], b.n_seq_id[i], b.seq_id[i][0], b.logits[i] = token, position, 1, sequence, last
        if lib.llama_decode(self.context, b):
            raise RuntimeError("llama.cpp failed to decode")
        numpy, vocab = importlib.import_module("numpy"), self.shape.vocab
        rows = [i for i, (*_, last) in enumerate(tokens) if last]
        logits = (lib.llama_get_logits_ith(self.context, i) for i in rows)
        return [int(numpy.ctypeslib.as_array(row, (vocab,)).argmax()) for row in logits]

    def generate(self, prompts: Tokens, count: int) -> Tokens:
        if self.count != len(prompts):
            self._open(len(prompts))
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)
        last = len(prompts[0]) - 1
        read = [(token, t, i, t == last) for i, prompt in enumerate(prompts) for t, token in enumerate(prompt)]
        steps = [self._decode(read)]
        for step in range(1, count):
            steps.append(self._decode([(token, last + step, i, True) for i, token in enumerate(steps[-1])]))
        return [list(row) for row in zip(*steps)]


class Machine:
    """What the machine can do: `read` and `multiply` return seconds."""

    def __init__(self, shape: Shape) -> None:
        generator = torch.Generator().manual_seed(0)
        rows = shape.vocab + 12 * shape.layers * shape.width  # as many weights as a decode step reads
        self.shape = shape
        self.weights = torch.randn(rows, shape.width, generator=generator)
        self.vector = torch.randn(shape.width, generator=generator)

    def read(self) -> float:
        """Read as many bytes as the fp32 weights, by the faster of a matrix-vector product and a sum; seconds."""
        return min(seconds(lambda: torch.mv(self.weights, self.vector)), seconds(self.weights.sum))

    def multiply(self, batch: int) -> float:
        """Compute the matrix products of a prefill, each layer with its own weights; seconds."""
        c, n = self.shape.width, batch * self.shape.prompt
        blocks = self.weights[: 12 * self.shape.layers * c].view(self.shape.layers, 12, c, c)
        narrow, wide = torch.randn(n, c), torch.randn(n, 4 * c)

        def products() -> None:
            for layer in blocks:
                F.linear(narrow, layer[:3].view(3 * c, c))
                F.linear(narrow, layer[3])
                F.linear(narrow, layer[4:8].view(4 * c, c))
                F.linear(wide, layer[8:].view(c, 4 * c))

        return min(seconds(products) for _ in range(2))


def seconds(call: Callable[[], Any]) -> float:
    """Return the time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def engine(name: str, setup: Setup) -> Engine:
    """Load a variant in this process."""
    kind = FastGPT if name in OWN else Transformers if name in TRANSFORMERS else LlamaCpp
    return kind(name, setup)


class Process(Apart):
    """A variant, or the machine's own speed, in a separate process. `weight_bytes` are those of its weights."""

    def __init__(self, name: str, setup: Setup) -> None:
        super().__init__(name, setup, serve)
        self.weight_bytes = int(self.flops.get("weight_bytes", 0))

    def run(self, batch: int, count: int) -> tuple[float, Tokens]:
        """Return seconds and tokens of `count` steps; for the machine (0: read, 1: multiply), seconds alone."""
        self.pipe.send((batch, count))
        taken, tokens, self.peak_mb = self._answer()
        return taken, tokens


def serve(pipe: Connection, name: str, setup: Setup) -> None:
    """Run a process: generate what is asked for until 0 arrives."""
    torch.set_num_threads(setup.threads)
    if name == MACHINE:
        machine = Machine(setup.shape)
        pipe.send({})
        while message := pipe.recv():
            batch, product = message
            pipe.send((machine.multiply(batch) if product else machine.read(), [], 0.0))
        return
    small = engine(name, Setup(WARM, setup.folder / "warm", setup.threads))
    if name != "transformers static":  # which would compile for half a minute
        small.generate(WARM.prompts(1), WARM.new)
    del small
    gc.collect()
    before = resident_mb("VmRSS")
    found = engine(name, setup)
    pipe.send({"weight_bytes": float(found.weight_bytes)})
    batches: set[int] = set()
    with torch.no_grad():
        while message := pipe.recv():
            batch, count = message
            prompts = setup.shape.prompts(batch)
            start = time.perf_counter()
            tokens = found.generate(prompts, count)
            pipe.send((time.perf_counter() - start, tokens, resident_mb("VmHWM") - before))
            if batch not in batches:  # the first run of a batch is warm-up
                batches.add(batch)
                gc.collect()
                with contextlib.suppress(OSError):  # without this file the peak includes loading
                    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
