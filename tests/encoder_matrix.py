"""What fastgpt.patch replaces in each encoder and encoder-decoder of transformers: check it, and write
docs/encoders.md.

`python tests/encoder_matrix.py [--kept FOLDER] [TYPE ...]` checks the types and keeps each result in a folder, from
which the next run goes on. `--write` writes the results to encoder_rows.jsonl, from which the page is made; rows of
types that are not checked stay.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import encoder_models
import matrix
import torch
from causal_models import VOCAB
from encoder_models import CLASSES
from hf_parity import InFp64, excess, joined, outcome_of
from matrix import EPS, Row
from torch import Tensor

import fastgpt
from fastgpt.patching import PARTS

PAGE = Path(__file__).parent.parent / "docs" / "encoders.md"
ROWS = Path(__file__).with_name("encoder_rows.jsonl")
RECORDED = ("kind", "ops", "left", "notes", "quick")  # of a row, in ROWS
GROUPS = ("bart", "bert", "modernbert", "mt5", "t5gemma", "vit", "whisper")  # the patterns that others lack


def outcome(model: Any, name: str, seed: int = 0) -> dict[str, Tensor]:
    """Return logits, losses of several sets of labels, and every gradient of the first one, for one kind of input."""
    wide = next(model.parameters()).dtype
    given = encoder_models.inputs_of(model, name, seed)
    given = {n: t.to(wide) if t.is_floating_point() else t for n, t in given.items()}
    labels = encoder_models.labels_of(model, seed)
    classes, sets = (CLASSES, CLASSES) if labels.dim() == 1 else (VOCAB, 2)
    return outcome_of(model, given, labels, sets, classes, **decoder_inputs(model, seed))


def decoder_inputs(model: Any, seed: int) -> dict[str, Tensor]:
    """Return what an encoder-decoder needs in place of labels."""
    if not model.config.is_encoder_decoder:
        return {}
    return {"decoder_input_ids": encoder_models.labels_of(model, seed + 1).clamp(min=5)}


def exact(model: Any, name: str, seed: int = 0) -> dict[str, Tensor]:
    """Return the outcome in fp64."""
    with InFp64():
        return outcome(copy.deepcopy(model).double(), name, seed)


def check(kind: str, quick: bool = False) -> Row:
    """Check one type; quick: all parts together on plain and right-padded input, without generation."""
    model = encoder_models.make(kind)
    row = Row(kind, type(model).__name__, quick=quick)
    report = fastgpt.patch_report(fastgpt.patch(copy.deepcopy(model), dry_run=True))
    for part in PARTS:
        row.ops[part] = sorted({e.op for e in report.replaced if e.part == part})
        row.left[part] = sorted({e.why for e in report.left if e.part == part})
    for name in encoder_models.kinds(model)[: 2 if quick else None]:
        _compare(row, model, name, quick)
    if not quick and model.config.is_encoder_decoder and model.can_generate():
        _generate(row, model)
    return row


def _compare(row: Row, model: Any, name: str, quick: bool) -> None:
    """Compare one kind of input: every part alone on plain input (unless quick), all together on every input."""
    try:
        base, truth = outcome(copy.deepcopy(model), name), exact(model, name)
        if not all(bool(t.isfinite().all()) for t in truth.values()):
            raise ArithmeticError("numbers that are not finite")
    except Exception as e:  # the model does not take such input
        row.notes.append(f"{name}: {_line(e)}")
        return
    parts = [p for p in PARTS if row.ops[p]] if name == "plain" and not quick else []
    for only in [*parts, None] if any(row.ops.values()) else []:
        patched = fastgpt.patch(copy.deepcopy(model), only=only, quiet=True)
        try:
            bad = excess(*without_zeros(outcome(patched, name), base, truth), eps=EPS)
            bad = _again(model, only, name) if bad else bad
        except Exception as e:
            row.wrong.append(f"{name}, {only or 'all parts'}: {_line(e)}")
            continue
        if bad:
            worst = max(bad, key=lambda n: bad[n])
            row.wrong.append(f"{name}, {only or 'all parts'}: {worst} {bad[worst]:.3g} ({len(bad)} of {len(base)})")
        if only is None:
            given = encoder_models.inputs_of(patched, name)
            others = ({"labels": encoder_models.labels_of(patched)}, decoder_inputs(patched, 0))
            matrix.call_strictly(row, patched, [{**given, **more} for more in others])
        if only is None and name == "plain":
            fresh = fastgpt.patch(copy.deepcopy(model), quiet=True)
            after = outcome(fastgpt.unpatch(fresh), name)
            row.wrong += [f"unpatched: {n}" for n, t in base.items() if not torch.equal(after[n], t)][:3]
            row.error = float((base["logits"] - truth["logits"]).abs().max())


def _again(model: Any, only: str | None, name: str) -> dict[str, float]:
    """Return what breaks the rule over several batches together: an error is a random number, and that of a small
    tensor may be small by chance in one batch."""
    runs = []
    for seed in range(1, 6):
        patched = fastgpt.patch(copy.deepcopy(model), only=only, quiet=True)
        runs.append((outcome(patched, name, seed), outcome(copy.deepcopy(model), name, seed), exact(model, name, seed)))
    return excess(*without_zeros(*joined(runs)), eps=EPS)


def without_zeros(*sides: dict[str, Tensor]) -> Any:
    """Leave out the gradients that are zero but for rounding (a bias before a norm over its columns), within the 32
    units in the last place that the rule of parity has for zero: (ours, base, truth) -> the same."""
    norms = {n: float(t.norm()) for n, t in sides[-1].items()}
    least = 32 * EPS * max((v for n, v in norms.items() if n.startswith("d")), default=0.0)
    return ({n: t for n, t in side.items() if not (n.startswith("d") and norms[n] <= least)} for side in sides)


def _generate(row: Row, model: Any) -> None:
    """Compare greedy generation."""
    for name in encoder_models.kinds(model)[:2]:
        given = encoder_models.inputs_of(model, name)
        if not matrix.compare_generation(row, model, name, given, _line):
            return


def _line(e: Exception) -> str:
    return f"{type(e).__name__}: {' '.join(str(e).split()).split('. ')[0][:120]}"


def kept(kind: str, folder: Path | None, quick: bool = False) -> Row:
    """Return the result of a type, from the folder if it is there; an exception of the type itself is a note."""
    return matrix.kept(kind, folder, quick, check, _line)


def record_of(row: Row) -> dict[str, Any]:
    """Return what ROWS holds of a row."""
    return {name: getattr(row, name) for name in RECORDED}


def recorded() -> list[Row]:
    """Return the rows of ROWS."""
    return [Row(**json.loads(line)) for line in ROWS.read_text(encoding="utf-8").splitlines()]


def page(rows: list[Row]) -> str:
    """Return docs/encoders.md."""
    nothing = sum(bool(r.ops) and not any(r.ops.values()) and not any(r.left.values()) for r in rows)
    full, wrong = sum(r.full for r in rows) - nothing, sum(bool(r.wrong) for r in rows)
    quick = sum(r.quick for r in rows)
    fails = "".join(f"- {r.kind}, {n}\n" for r in rows for n in r.notes if r.ops and not r.uncompared)
    return ABOUT.format(
        full=full, partly=len(rows) - full - wrong - nothing, wrong=wrong, types=len(rows), nothing=nothing,
        how=QUICK.format(quick=quick) if quick else "", fails=FAILS + fails if fails else "", **matrix.table(rows),
    )  # fmt: skip


def write(rows: list[Row]) -> None:
    """Write ROWS and PAGE, with the rows that are there of other types."""
    all_rows = {r.kind: r for r in [*(recorded() if ROWS.exists() else []), *rows]}
    lines = (json.dumps(record_of(all_rows[kind]), ensure_ascii=False) + "\n" for kind in sorted(all_rows))
    ROWS.write_text("".join(lines), encoding="utf-8")
    PAGE.write_text(page(recorded()), encoding="utf-8")


QUICK = """

Of {quick} types, marked \\*, only all parts together were compared so far, on plain and right-padded batches, without
generation."""
ABOUT = """# Encoders and encoder-decoders

What `fastgpt.patch(model)` replaces in the encoders and encoder-decoders of Hugging Face transformers 5.23, and by
which op. The {types} types are those that transformers maps to sequence to sequence, speech to text (both with an
encoder and a decoder), masked tokens or classes of images, each as the first of these. **{full} types are replaced in
every part that they have, {partly} partly, {wrong} wrong.** Types without a part to replace: {nothing}.

Each type is built from its config class, tiny and with random weights. Each part is patched alone, then all together:
logits, losses and every gradient are compared with transformers' own code in fp64, text on plain, right-padded and
left-padded batches. The rule is that of [families](families.md). Encoder-decoders generate greedily with the cache, and
must give the same tokens. The model must be the same bit for bit after `unpatch`. "none" is a part that the type does
not have.

Attention in both directions runs on the op with padding on either side, with a window, and over the keys of an
encoder. A bias of positions, as in T5, is left: the op has no bias.

`python tests/encoder_matrix.py --write` writes this page, a test fails if it differs from the results that were
recorded, and one marked `extended` checks every type again.{how}

{table}

Left unchanged, because

{notes}{fails}"""
FAILS = """
Not compared, because it fails without a patch

"""


def main() -> None:
    parser = matrix.arguments(__doc__, "all parts together alone, without generation", f"{ROWS.name} and {PAGE.name}")
    args = parser.parse_args()
    kinds = args.types or encoder_models.types()
    rows = matrix.results(kinds, args.kept, lambda kind: kept(kind, args.kept, args.quick))
    if any(row.wrong for row in rows):
        raise SystemExit("some types are wrong; nothing was written")
    if args.write:
        write(rows)


if __name__ == "__main__":
    main()
