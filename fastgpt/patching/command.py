"""`fastgpt patch-report`: list what `fastgpt.patch` would replace in a Hugging Face model, from its configuration.

The model is built on PyTorch's meta device: it has shapes and no weights, so an 8B model takes a second or two and no
memory. Code from a repository (`trust_remote_code`) is not run.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import torch

from fastgpt.core.command import Parser
from fastgpt.core.errors import UserError
from fastgpt.patching import PARTS, patch, patch_report

EXPECTED = "expected a folder with config.json, such a file, or the name of a model on the Hugging Face Hub"


def model_of(config: Any) -> Any:
    """Build the model of a configuration on the meta device: of the class that it names, else as a causal language
    model, else the base model.

    Raises:
        UserError: transformers cannot build it.
    """
    import transformers

    named = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ()]
    builders = [c._from_config for c in named if c is not None and hasattr(c, "_from_config")]
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        builders += [auto.from_config] if type(config) in auto._model_mapping else []
    if not builders:
        raise UserError(f"patch-report: transformers has no model for the type {config.model_type!r}")
    try:
        with torch.device("meta"):
            return builders[0](config)
    except Exception as e:
        kind = config.model_type
        raise UserError(f"patch-report: cannot build a model of the type {kind!r}: {_first_line(e)}") from e


def config_of(model: str) -> Any:
    """Return the configuration of a folder, file or name.

    Raises:
        UserError: transformers is not installed, or there is no configuration that it can read.
    """
    try:
        import transformers
    except ImportError as e:
        raise UserError("patch-report: transformers is not installed: pip install fastgpt[hf]") from e
    path = Path(model)
    local = path.exists() or path.suffix == ".json" or model.startswith((".", "/", "~"))
    if local and not (path.is_file() or (path / "config.json").is_file()):
        raise UserError(f"patch-report: {model} has no configuration: {EXPECTED}")
    try:
        return transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as e:
        raise UserError(f"patch-report: cannot read the configuration of {model}: {_first_line(e)}; {EXPECTED}") from e


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def main(argv: list[str]) -> int:
    """Run `fastgpt patch-report`; return 1 if nothing would be replaced."""
    parser = Parser(
        prog="fastgpt patch-report",
        description="List what fastgpt.patch would replace in a Hugging Face model, and what it would leave and why. "
        "Only the configuration is read, no weights.",
    )
    parser.add_argument("model", metavar="MODEL_OR_CONFIG", help=EXPECTED.removeprefix("expected "))
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"parts: {', '.join(PARTS)}")
    parser.add_argument("--keep-logits", action="store_true", help="as keep_logits=True of fastgpt.patch")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args(argv)

    logging.getLogger("transformers").setLevel(logging.ERROR)  # its advice is about running a model
    model = model_of(config_of(args.model))
    report = patch_report(patch(model, only=args.only, keep_logits=args.keep_logits, dry_run=True))
    if args.json:
        lists = {name: [dataclasses.asdict(e) for e in getattr(report, name)] for name in ("replaced", "left")}
        print(json.dumps({"model": type(model).__name__, **lists, "notes": report.notes}, indent=1))
    else:
        print(f"{type(model).__name__}: {report}")
    return 0 if report.replaced else 1
