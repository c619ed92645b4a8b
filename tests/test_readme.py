"""Commands and code in README and the pages of docs, executed verbatim (.ci/run runs make's two commands; here their
recipes must exist)."""

import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAINING, MODULES, PATCHING, BENCHMARKS, GENERATION = (
    (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("training", "modules", "patching", "benchmarks", "generation")
)
PAGES = (README, TRAINING, MODULES, PATCHING, BENCHMARKS, GENERATION)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.M | re.S)


def commands(page: str) -> list[str]:
    lines = [re.sub(r"\s+# .*", "", line).strip() for block in blocks(page, "bash") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the files that the commands use: a text and a token shard."""
    here = tmp_path_factory.mktemp("readme")
    shutil.copy(ROOT / "fastgpt" / "train.py", here / "my.txt")
    (here / "shards").mkdir()
    ids = [i * 7919 % 500 for i in range(5000)]
    # uint32, so the vocabulary is as large as the ids need; uint16 shards without a tokenizer imply GPT-2's 50257
    (here / "shards" / "train_uint32.bin").write_bytes(struct.pack(f"<{len(ids)}I", *ids))
    return here


def execute(command: str, folder: Path) -> str:
    """Run a command in a folder and return what it said."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "XDG_CACHE_HOME": str(folder / "cache")}  # `fastgpt tune` writes there
    words, nothing = shlex.split(command), subprocess.DEVNULL
    done = subprocess.run(words, cwd=folder, stdin=nothing, capture_output=True, text=True, env=env)
    assert done.returncode == 0, command + done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [README, *(pytest.param(page, marks=pytest.mark.extended) for page in (TRAINING, BENCHMARKS))],
    ids=["README", "training", "benchmarks"],
)
def test_fastgpt_commands(folder: Path, page: str) -> None:
    """Run them in the page's order, in one folder: `fastgpt sample` uses the run of the commands before it. One test
    per page, since several would be distributed over processes."""
    run = [c for c in commands(page) if c.startswith("fastgpt ")]
    assert run
    for command in run:
        execute(command, folder)


@pytest.mark.slow
def test_a_data_set_is_built_inspected_and_trained_on(tmp_path: Path) -> None:
    """The commands of README with few texts of the recipe's sources, a small vocabulary and two steps."""
    section = README.split("## Build a data set")[1].split("\n## ")[0]
    build, inspect, train = re.findall(r"^    (fastgpt .*?) +# ", section, re.M)
    recipe = yaml.safe_load((ROOT / "recipes" / "python.yaml").read_text(encoding="utf-8"))
    assert recipe["sources"].pop("debian")["optional"]  # needs a network
    recipe["sources"]["code"]["path"] = "{stdlib}/email/*.py"
    recipe["sources"]["docs"]["sample"] = 0.05
    recipe |= {"validation": 0.5, "tokenizer": {"train": {"vocab_size": 300, "bytes": 50_000}}, "workers": 1}
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "python.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    execute(build, tmp_path)
    assert "code PSF-2.0, docs PSF-2.0" in execute(inspect, tmp_path)
    execute(f"{train} --max-steps 2", tmp_path)
    metrics = (tmp_path / "runs" / "python" / "metrics.jsonl").read_text(encoding="utf-8")
    assert '"val_loss.code": ' in metrics and '"val_loss.docs": ' in metrics


@pytest.mark.parametrize(
    "code", [block for page in PAGES for block in blocks(page, "python") if "127.0.0.1:8000" not in block]
)
def test_python_block(code: str) -> None:
    """Those that call a server are run by tests/serve/test_clients.py."""
    exec(compile(code, "README.md", "exec"), {})


def test_make_commands_exist_and_the_rest_is_covered() -> None:
    for command in [c for c in commands(README) if c.startswith("make ")]:
        subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, check=True, capture_output=True)
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "make train" in ci and "make test" in ci
    others = [c for p in (README, TRAINING, BENCHMARKS) for c in commands(p) if not c.startswith(("make ", "fastgpt "))]
    assert all(c.startswith("pip install") for c in others), "tests/test_packaging.py installs in these ways"


def test_every_configuration_and_link_exists() -> None:
    assert {p.stem for p in (ROOT / "fastgpt" / "configs").glob("*.yaml")} <= set(re.findall(r"`([\w.-]+)`", README))
    assert all((ROOT / target).exists() for target in re.findall(r"\]\((?!http)([^)#]+)\)", README))
