"""Documents that share a sequence: their losses are those of each alone, and nothing of one reaches another."""

import itertools
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_train import SMALL

from fastgpt import train
from fastgpt.core.backend import parse_choices, use
from fastgpt.core.command import run_command
from fastgpt.data import IGNORE, ShardWriter, TokenLoader, Tokens
from fastgpt.data.batch import Batch
from fastgpt.data.packed import PackedLoader
from fastgpt.data.source import open_source
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.nn import RotaryEmbedding
from fastgpt.training.build import build_loader
from fastgpt.training.config import TrainConfig, load_config
from fastgpt.training.task import NextToken

EOT, T = 0, 24
SIZES = [5, 9, 3, 1, 24, 12, 7, 2, 16, 11]
METHODS = ("concatenate", "best-fit", "pad")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put runs and prepared data into the test's folder; forget kernel choices afterwards."""
    monkeypatch.chdir(tmp_path)
    with use():
        yield tmp_path


def documents(kernels: str) -> list[list[int]]:
    """Return documents; fewer for Triton, whose interpreter is slow."""
    rng = np.random.default_rng(0)
    sizes = SIZES[:5] if "triton" in kernels else SIZES
    return [[EOT, *rng.integers(1, 50, size - 1).tolist()] for size in sizes]


def loader_of(method: Any, stream: list[int]) -> TokenLoader:
    tokens = Tokens([np.array(stream, np.uint16)])
    if method == "concatenate":
        return TokenLoader(tokens, 1, T, eot=EOT)
    return PackedLoader(tokens, 1, T, method, EOT, masks=True)


def model_of(positions: str) -> GPT:
    torch.manual_seed(1)
    shape: dict[str, Any] = dict(n_layers=2, n_heads=2, width=32, vocab_size=50, vocab_multiple=1, block_size=T)
    model = GPT(ModelConfig(positions=positions, **shape), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)  # so that attention and positions matter
    return model


def losses(model: GPT, batch: Batch) -> torch.Tensor:
    """Return the loss of each token, (B, T)."""
    more = {"doc_ids": batch.doc_ids, "positions": batch.positions}
    found: torch.Tensor = model(batch.ids, batch.targets, reduction="none", **more)
    return found


@pytest.mark.parametrize(
    "kernels,method,positions",
    [
        *itertools.product(["all=torch", "all=auto"], ["best-fit", "pad"], ["learned", "rope"]),
        ("attention=triton", "best-fit", "rope"),
    ],
)
def test_the_loss_is_that_of_each_document_alone(kernels: str, method: str, positions: str) -> None:
    use(**parse_choices(kernels))
    model, parts = model_of(positions), documents(kernels)
    loader = loader_of(method, sum(parts, []))
    batches = [next(loader) for _ in range(loader.windows)]
    together = sum(NextToken().loss(model, batch)[0] for batch in batches)
    alone = torch.zeros(())
    for i, part in enumerate(parts):
        behind = EOT if i + 1 < len(parts) else IGNORE  # the stream ends with the last document
        alone = alone + model(torch.tensor([part]), torch.tensor([[*part[1:], behind]]), reduction="sum")
    torch.testing.assert_close(together, alone)
    counted = sum(int(NextToken().counted(batch)) for batch in batches)
    assert counted == sum(map(len, parts)) - 1
    expected = torch.autograd.grad(alone, list(model.parameters()))
    for a, b in zip(torch.autograd.grad(together, list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize(
    "kernels,method", [*itertools.product(["all=torch", "all=auto"], METHODS), ("attention=triton", "best-fit")]
)
def test_nothing_of_a_document_reaches_another(kernels: str, method: str) -> None:
    use(**parse_choices(kernels))
    model, loader = model_of("rope"), loader_of(method, sum(documents(kernels), []))
    tried = 0
    with torch.no_grad():
        for batch in (next(loader) for _ in range(loader.windows)):
            before, docs = losses(model, batch), batch.doc_ids[0]
            for number in docs.unique().tolist():
                inside = (docs == number).nonzero().flatten()
                ids = batch.ids.clone()
                ids[0, inside] = (ids[0, inside] + 7) % 50
                after = losses(model, batch._replace(ids=ids))
                others = docs != number
                assert torch.equal(after[0, others], before[0, others])
                counts = batch.targets[0, inside] != IGNORE
                assert not counts.any() or not torch.equal(after[0, inside], before[0, inside])
                tried += int(others.any())
    assert tried >= 3 or method == "pad"


def texts(folder: Path) -> Path:
    """Write a folder of short documents."""
    (folder / "texts").mkdir()
    for i, path in enumerate(sorted(Path(train.__file__).parent.glob("training/*.py"))):
        (folder / "texts" / f"{i}.txt").write_text(path.read_text(encoding="utf-8")[:1500], encoding="utf-8")
    return folder / "texts"


def go(data: Path, *more: str) -> int:
    return train.main([*SMALL, "--data", str(data), "--out", "run", *more])


def rows() -> list[dict[str, float]]:
    return [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]


def trained() -> list[tuple[int, float]]:
    return [(int(r["step"]), r["loss"]) for r in rows() if "loss" in r]


@pytest.mark.parametrize(
    "method",
    [
        "best-fit",
        pytest.param("pad", marks=pytest.mark.slow),
        pytest.param("concatenate", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_resumes_with_the_same_bits(method: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, extra = texts(here), ["--doc-masks", "--packing", method]
    assert go(data, *extra) == 0
    whole = rows()
    shutil.rmtree("run")
    real = train.learning_rate

    def signalled(cfg: TrainConfig, number: int, last_step: int) -> float:
        if number == 4:
            signal.raise_signal(signal.SIGTERM)
            monkeypatch.setattr(train, "learning_rate", real)
        return real(cfg, number, last_step)

    monkeypatch.setattr(train, "learning_rate", signalled)
    assert go(data, *extra) == 0
    assert trained()[-1][0] == 5
    assert go(data, *extra) == 0
    assert trained() == [(int(r["step"]), r["loss"]) for r in whole if "loss" in r]
    assert [r["val_loss"] for r in rows() if "val_loss" in r][-1] == [r["val_loss"] for r in whole if "val_loss" in r][
        -1
    ]


def test_masks_change_the_loss_of_a_run(here: Path) -> None:
    data = texts(here)
    found = {}
    for name, extra in {"plain": [], "masks": ["--doc-masks"], "fit": ["--packing", "best-fit"]}.items():
        assert go(data, "--max-steps", "2", *extra) == 0
        found[name] = trained() + [(0, rows()[-1]["val_loss"])]
        shutil.rmtree("run")
    assert len({json.dumps(f) for f in found.values()}) == 3


def test_shards_without_a_tokenizer_do_not_say_where_documents_begin(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ShardWriter(here / "a.bin", 300) as shard:
        shard.write(np.arange(4000) % 300)
    for extra in (["--doc-masks"], ["--packing", "pad"]):
        assert run_command(lambda extra=extra: go(here / "a.bin", *extra)) == 2
        said = capsys.readouterr().err
        assert "a.bin has no tokenizer, which would say where documents begin: pass --tokenizer" in said
        assert "Traceback" not in said and not Path("run").exists()


def test_the_method_of_a_run(here: Path) -> None:
    source = open_source(str(texts(here)), vocab_size=300)
    cfg = load_config([*SMALL, "--packing", "best-fit"])
    loader = build_loader(cfg, source, torch.device("cpu"))
    assert isinstance(loader, PackedLoader) and loader.eot is None and len(next(loader)) == 2
    loader = build_loader(load_config([*SMALL, "--doc-masks"]), source, torch.device("cpu"))
    assert not isinstance(loader, PackedLoader) and isinstance(next(loader), Batch)


def test_dynamic_scaling_within_the_original_context_does_not_wait_for_positions() -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32}
    nowhere = torch.zeros(2, 32, dtype=torch.int64, device="meta")  # whose values cannot be read
    RotaryEmbedding(8, 32, scaling=scaling).adapt(32, nowhere)
    with pytest.raises(RuntimeError):
        RotaryEmbedding(8, 33, scaling=scaling).adapt(32, nowhere)
