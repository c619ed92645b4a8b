"""transformers' own model tests on patched models: `python tests/transformers_suite.py llama gpt2`.

Downloads the source distribution of the installed transformers version (and `parameterized`, which its tests import)
with pip into a temporary folder, runs a family's tests there once as it is and once with every model patched at its
first `to()`, `eval()` or `train()`, and compares the verdicts of all tests. A test whose verdict differs is run again
in both ways; one that differs again is listed with a reason, or as a fault. Exit code 1 if there is a fault.

A source distribution has the common tests of all models (tests/test_modeling_common.py) and no tests/models: a class of
these tests is then made for each family, with a tiny configuration. `--checkout DIR` takes a checkout of the same
version instead, and runs its tests/models/<family>. `--write` puts the table into docs/transformers_tests.md, keeping
the rows of other families. This file is also the pytest plugin that patches the models.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import weakref
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from patched_pairs import TEN

PAGE = Path(__file__).parent.parent / "docs" / "transformers_tests.md"
FAMILIES = "gpt2 gpt_neox llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi3"
# what tests/test_modeling_common.py imports from folders that a source distribution lacks
ABSENT = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
}
MADE = """
import unittest, torch, transformers
from patched_pairs import COMMON, NO_TOKENS, TEN
from .test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask

KIND = {kind!r}

class Tester:
    batch_size, seq_length, is_training, vocab_size = 3, 7, True, 197
    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 64

    def get_config(self):
        common = {{"n_positions" if KIND == "gpt2" and n.startswith("max") else n: v for n, v in COMMON.items()}}
        tokens = {{**NO_TOKENS, "pad_token_id": 0}}
        return transformers.AutoConfig.for_model(KIND, **{{**TEN[KIND], **common, **tokens}})

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 1) + 1
        return self.get_config(), {{"input_ids": ids, "attention_mask": random_attention_mask(list(ids.shape))}}

CONFIG = type(Tester().get_config())
CAUSAL, BASE = (getattr(transformers, auto)._model_mapping[CONFIG] for auto in ("AutoModelForCausalLM", "AutoModel"))

class ModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (BASE, CAUSAL)
    all_generative_model_classes = ()
    pipeline_model_mapping = {{}}

    def setUp(self):
        self.model_tester = Tester()
"""
SWITCH, COUNT = "FASTGPT_PATCH_MODELS", "FASTGPT_PATCH_COUNT"
# name of a test -> why its verdict may differ, by what the test demands of a model
REASONS = (
    (r"attention_outputs|output_attention|attentions|hidden_states_output", "asks for attention weights"),
    (r"assisted_decoding|beam_search_generate_dict|greedy_generate_dict|sample_generate_dict|beam_sample_generate_dict",
     "asks generate() for attention weights"),
    (r"attn_implementation|attention_implementation|can_set_attention|sdpa_can_dispatch|eager_attention|flash_attn",
     "asks for the name or the class of an attention implementation"),
    (r"eager_matches_sdpa|eager_padding_matches", "compares outputs at padding tokens"),
    (r"loss_function|training_logits|problem_types", "reads logits in training (keep_logits=True has them)"),
)  # fmt: skip


def pytest_configure(config: Any) -> None:
    """Patch models, if the environment says so; pytest calls it as this file is loaded as a plugin."""
    if os.environ.get(SWITCH):
        patch_all_models()


def patch_all_models() -> None:
    """Make every transformers model patch itself at its first to(), eval() or train()."""
    import warnings

    from torch import nn
    from transformers import PreTrainedModel

    import fastgpt

    seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def patched(method: Any) -> Any:
        def first_patch(self: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(self, PreTrainedModel) and self not in seen:
                seen.update(self.modules())  # the layers of a patched model are not patched again
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    fastgpt.patch(self, quiet=True)
                with open(os.environ[COUNT], "a", encoding="utf-8") as f:
                    f.write(f"{len(fastgpt.patch_report(self).replaced)}\n")
            return method(self, *args, **kwargs)

        return first_patch

    for name in ("to", "eval", "train"):
        setattr(nn.Module, name, patched(getattr(nn.Module, name)))


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=True)


def fetch(folder: Path) -> Path:
    """Download and unpack the source distribution; return its folder."""
    version = importlib.metadata.version("transformers")
    pip("download", "--no-deps", "--no-binary=transformers", f"transformers=={version}", "--dest", str(folder))
    (archive,) = folder.glob("transformers-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return next(p for p in folder.glob("transformers-*") if p.is_dir())


def target_of(source: Path, family: str) -> str:
    """Return the tests of a family; if the source has none, write a file of the common tests."""
    for folder in (family, family.removesuffix("_text")):
        if (source / "tests" / "models" / folder).is_dir():
            return f"tests/models/{folder}"
    if family not in TEN:
        raise SystemExit(f"{family}: there is no tests/models/{family}, and this file makes tests of {FAMILIES} only")
    for path, text in {**ABSENT, "__init__.py": "", f"test_{family}.py": MADE.format(kind=family)}.items():
        place = source / "tests" / path
        if not place.exists():
            place.parent.mkdir(exist_ok=True)
            place.write_text(text, encoding="utf-8")
            (place.parent / "__init__.py").touch()
    return f"tests/test_{family}.py"


def verdicts(source: Path, folder: Path, targets: list[str], patched: bool) -> tuple[dict[str, str], int]:
    """Run tests; return the verdict of each (passed, failed, skipped), and how many models were patched. folder: for
    what is written, with the packages that the tests need."""
    out, count = folder / f"verdicts-{patched}.xml", folder / "count.txt"
    for path in (out, count):
        path.unlink(missing_ok=True)
    here, root = Path(__file__).parent, Path(__file__).parent.parent
    path = [str(p) for p in (source, here, root, folder / "packages", *filter(None, sys.path))]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1", COUNT: str(count)}
    env |= {SWITCH: "1"} if patched else {}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "transformers_suite", "-p", "no:cacheprovider", "--tb=no",
               f"--junitxml={out}", *targets]  # fmt: skip
    done = subprocess.run(command, cwd=source, env=env, capture_output=True, text=True)
    if not out.exists():
        raise SystemExit(f"pytest did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    found = {}
    for case in ElementTree.parse(out).iter("testcase"):
        kinds = {child.tag for child in case}
        name = f"{case.get('classname')}.{case.get('name')}"
        found[name] = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
    return found, len(count.read_text(encoding="utf-8").split()) if count.exists() else 0


def node(name: str) -> str:
    """Return the pytest id of a test by its name in the JUnit file."""
    module, cls, test = re.fullmatch(r"(tests\..+?)\.([A-Z]\w*)\.(.+)", name).groups()  # type: ignore[union-attr]
    return f"{module.replace('.', '/')}.py::{cls}::{test}"


def compare(source: Path, folder: Path, family: str) -> dict[str, Any]:
    """Run a family's tests in both ways; return numbers and the differences with their reasons."""
    target = [target_of(source, family)]
    before, _ = verdicts(source, folder, target, False)
    after, patched = verdicts(source, folder, target, True)
    if not patched:
        raise SystemExit(f"{family}: no model was patched")
    suspects = [name for name in before if before[name] != after.get(name)]
    if suspects:  # some tests depend on chance
        targets = [node(name) for name in suspects]
        before |= verdicts(source, folder, targets, False)[0]
        after |= verdicts(source, folder, targets, True)[0]
    found = [name for name in suspects if before[name] != after.get(name)]
    reasons = {name: next((why for what, why in REASONS if re.search(what, name)), "") for name in found}
    rows = [[name.rsplit(".", 1)[1], before[name], after.get(name, "missing"), reasons[name]] for name in sorted(found)]
    passed, failed = (sum(v == kind for v in before.values()) for kind in ("passed", "failed"))
    return {"passed": passed, "failed": failed, "patched": patched, "differences": rows}


def page(results: dict[str, dict[str, Any]], about: str) -> str:
    """Return the page with its data, from which a later run takes the rows of other families."""
    rows = []
    for family, r in sorted(results.items()):
        rows.append(f"| {family} | {r['passed']} | {r['failed']} | {r['patched']} | {len(r['differences'])} |")
    lists = []
    for family, r in sorted(results.items()):
        for name, before, after, why in r["differences"]:
            lists.append(f"| {family} | `{name}` | {before} | {after} | {why or '**fault**'} |")
    return "\n".join([
        "# transformers' own tests",
        "",
        "The model tests of transformers with every model patched, against the same tests without a patch: the common",
        "tests of its source distribution (`tests/test_modeling_common.py`), or `tests/models` of a checkout.",
        "`python tests/transformers_suite.py FAMILY... --write` runs them and writes this page. Tests that need the",
        "network or a GPU are skipped or fail in both runs.",
        "",
        about,
        "",
        "| family | passed | failed without patch | models patched | other verdict when patched |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "## Tests with another verdict",
        "",
        *(["| family | test | without patch | patched | reason |", "|---|---|---|---|---|"] if lists else ["None."]),
        *lists,
        "",
        f"<!-- {json.dumps(results)} -->",
        "",
    ])  # fmt: skip


def main() -> int:
    """Compare families; return 1 if a difference has no reason."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="+", help=f"folders of tests/models, such as {FAMILIES}")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} in docs")
    parser.add_argument(
        "--checkout",
        type=Path,
        metavar="DIR",
        help="checkout of transformers, or unpacked source distribution (default: download that)",
    )
    args = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pip("install", "--target", str(folder / "packages"), "parameterized")
        source = args.checkout.resolve() if args.checkout else fetch(folder)
        for family in args.families:
            results[family] = r = compare(source, folder, family)
            faults = [row for row in r["differences"] if not row[3]]
            print(f"{family}: {r['passed']} passed, {r['failed']} failed, {r['patched']} models patched, "
                  f"{len(r['differences'])} differ, {len(faults)} without a reason", flush=True)  # fmt: skip
            for name, before, after, why in r["differences"]:
                print(f"  {name}: {before} -> {after}: {why or 'FAULT'}", flush=True)
    if args.write:
        versions = {n: importlib.metadata.version(n) for n in ("transformers", "torch")}
        about = "With " + ", ".join(f"{n} {v}" for n, v in versions.items()) + ", on a CPU."
        before = re.search(r"<!-- (\{.*\}) -->", PAGE.read_text(encoding="utf-8")) if PAGE.exists() else None
        PAGE.write_text(page({**(json.loads(before[1]) if before else {}), **results}, about), encoding="utf-8")
    return any(not row[3] for r in results.values() for row in r["differences"])


if __name__ == "__main__":
    sys.exit(main())
