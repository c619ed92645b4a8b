"""What fastgpt.patch replaces in each causal language model of transformers: check it, and write docs/families.md.

`python tests/causal_matrix.py [--kept FOLDER] [TYPE ...]` checks the types and keeps each result in a folder, from
which the next run goes on. `--write` writes the results to causal_rows.jsonl, from which the page is made and the types
are grouped by the patterns recognised in them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import causal_models
import matrix
import torch
from causal_models import VOCAB, B, T
from hf_parity import exact, excess, excess_of_runs, outcome
from matrix import EPS, Row
from torch import Tensor

import fastgpt
from fastgpt.patching import PARTS, _find
from fastgpt.patching._recognise import Found
from fastgpt.patching._replace import GatedNorm

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
ROWS = Path(__file__).with_name("causal_rows.jsonl")
RECORDED = ("kind", "model", "ops", "left", "notes", "patterns")  # of a row, in ROWS
INPUTS = ("plain", "left padding", "packed")


def inputs_of(name: str) -> dict[str, Any]:
    """Return keyword arguments of a model's forward."""
    if name == "left padding":
        seen = torch.ones(B, T, dtype=torch.long)
        seen[0, :4] = 0
        return {"attention_mask": seen}
    if name == "packed":
        places = torch.cat([torch.arange(5), torch.arange(T - 5)])
        return {"position_ids": places.expand(B, -1), "use_cache": False}
    return {}


def labels_for(model: Any, name: str, seed: int = 0) -> Tensor:
    """Return labels; none where a token sees no key, which eager attention and ours differentiate differently."""
    labels = causal_models.labels(model, seed)
    labels[1, 3:6] = -100
    if name == "left padding":
        labels[0, :5] = -100
    return labels


def run(model: Any, name: str, seed: int = 0, how: Any = outcome) -> dict[str, Tensor]:
    """Return the outcome of a model for one kind of input."""
    given = causal_models.batch(model, seed) | inputs_of(name)
    return how(model, given.pop("input_ids"), labels_for(model, name, seed), 2, VOCAB, **given)


def _pattern(f: Found) -> str:
    """Return what patch recognised, more finely than by op."""
    call = getattr(f.call, "__name__", type(f.call).__name__)
    return " ".join([f.part, f.op, *_details(f, call)])


def _details(f: Any, call: str) -> list[str]:
    if f.part == "rope":
        from fastgpt.patching._rope import recognise

        r: Any = recognise(f.function)
        return [r.layout, *(n for n in ("interleaved", "unzipped") if getattr(r, n)), *(["back"] * (r.sign < 0))]
    if f.part == "loss" and f.arguments:
        h = f.arguments[0]
        return [call, *(n for n, v, d in (("scale", h.scale, 1), ("softcap", h.softcap, 0)) if v != d)]
    if f.part == "mlp" and f.arguments:
        return [call, f.arguments[0].kind, *(["packed"] * (f.arguments[0].packed is not None))]
    if f.part == "norm" and f.arguments:
        norm = f.arguments[0]
        if isinstance(norm, GatedNorm):
            return [norm.act, *(["gate first"] * norm.first), *(["groups"] * (norm.groups > 1))]
        return ["offset"] * bool(norm.offset) + ["no weight"] * (norm.weight is None)
    return [call] if f.part in ("attention", "mlp") else []


def check(kind: str, quick: bool = False) -> Row:
    """Check one type; quick: all parts together on plain input alone, without generation."""
    model = causal_models.make(kind)
    found = [f for _, _, f in _find(model, False)]
    row = Row(kind, type(model).__name__, patterns=sorted({_pattern(f) for f in found if f.op}))
    for part in PARTS:
        row.ops[part] = sorted({f.op for f in found if f.part == part and f.op})
        row.left[part] = sorted({f.why for f in found if f.part == part and not f.op})
    for name in INPUTS[:1] if quick else INPUTS:
        _compare(row, model, name, quick)
    if not quick:
        _generate(row, model)
    return row


def _compare(row: Row, model: Any, name: str, quick: bool) -> None:
    """Compare one kind of input: every part alone on plain input (unless quick), all together on every input."""
    try:
        base, truth = run(copy.deepcopy(model), name), run(model, name, how=exact)
    except Exception as e:  # the model does not take such input
        row.notes.append(f"{name}: {_first_line(e)}")
        return
    if any(t.isnan().any() for out in (base, truth) for t in out.values()):
        row.notes.append(f"{name}: without a patch its outputs are not numbers")
        return
    parts = [p for p in PARTS if row.ops[p]] if name == "plain" and not quick else []
    for only in [*parts, None]:
        patched = fastgpt.patch(copy.deepcopy(model), only=only, quiet=True)
        try:
            bad = excess(run(patched, name), base, truth, EPS)
            bad = _again(model, patched, name) if bad else bad
        except Exception as e:
            row.wrong.append(f"{name}, {only or 'all parts'}: {type(e).__name__}: {e}")
            continue
        if bad:
            worst = max(bad, key=lambda n: bad[n])
            row.wrong.append(f"{name}, {only or 'all parts'}: {worst} {bad[worst]:.3g} ({len(bad)} of {len(base)})")
        if only is None and name == "plain":
            given = causal_models.batch(model)
            matrix.call_strictly(row, patched, [{**given, "labels": labels_for(model, "plain")}, given])
            after = run(fastgpt.unpatch(patched), name)
            row.wrong += [f"unpatched: {n}" for n, t in base.items() if not torch.equal(after[n], t)][:3]
            row.error = float((base["logits"] - truth["logits"]).abs().max())


def _again(model: Any, patched: Any, name: str) -> dict[str, float]:
    """Return what breaks the rule over several batches together."""
    runs = [
        (run(patched, name, seed), run(copy.deepcopy(model), name, seed), run(model, name, seed, exact))
        for seed in range(1, 6)
    ]
    return excess_of_runs(runs, EPS)


def _generate(row: Row, model: Any) -> None:
    """Compare greedy generation."""
    for name in INPUTS[:2]:
        given = causal_models.batch(model)
        given |= {"inputs": given.pop("input_ids"), "attention_mask": torch.ones(B, T, dtype=torch.long)}
        given |= inputs_of(name) | causal_models.generation_settings(model)
        if not matrix.compare_generation(row, model, name, given, _first_line):
            return


def _first_line(e: Exception) -> str:
    return f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"


def _whole(e: Exception) -> str:
    return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"


def kept(kind: str, folder: Path | None, quick: bool = False) -> Row:
    """Return the result of a type, from the folder if it is there; an exception of the type itself is a note."""
    return matrix.kept(kind, folder, quick, check, _whole)


def record_of(row: Row) -> dict[str, Any]:
    """Return what ROWS holds of a row."""
    return {name: getattr(row, name) for name in RECORDED}


def recorded() -> list[Row]:
    """Return the rows of ROWS."""
    return [Row(**json.loads(line)) for line in ROWS.read_text(encoding="utf-8").splitlines()]


def groups(rows: Iterable[Row]) -> dict[str, list[str]]:
    """Return the types with the same patterns, under the first of them; of those that were built and compared."""
    found: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        if row.ops and not row.uncompared:
            found.setdefault(tuple(row.patterns), []).append(row.kind)
    return {kinds[0]: kinds for kinds in found.values()}


def page(rows: list[Row]) -> str:
    """Return docs/families.md."""
    full, wrong = sum(r.full for r in rows), sum(bool(r.wrong) for r in rows)
    return ABOUT.format(
        full=full, partly=len(rows) - full - wrong, wrong=wrong, types=len(rows), groups=len(groups(rows)),
        **matrix.table(rows),
    )  # fmt: skip


def write(rows: list[Row]) -> None:
    """Write ROWS and PAGE."""
    lines = (json.dumps(record_of(row), ensure_ascii=False) + "\n" for row in rows)
    ROWS.write_text("".join(lines), encoding="utf-8")
    PAGE.write_text(page(rows), encoding="utf-8")


ABOUT = """# Families

What `fastgpt.patch(model)` replaces in the causal language models of Hugging Face transformers 5.23, and by which op:
all {types} types that transformers maps to `AutoModelForCausalLM`, multimodal types as their text model. **{full} types
are replaced in every part that they have, {partly} partly, {wrong} wrong.**

Each type is built from its config class, tiny and with random weights. Each part is patched alone, then all together:
logits, losses and every gradient are compared with transformers' own code in fp64, on plain, left-padded and packed
batches. The error may be at most 2 (outputs) or 3 (gradients) times that of the unpatched model, plus one unit in the
last place. Greedy generation with the cache must give the same tokens, and the model must be the same bit for bit
after `unpatch`. "none" is a part that the type does not have.

Types in which the same patterns are recognised form a group; there are {groups} groups. Tests marked `extended` check
every type in this way; `make test` checks one type of each group, with all parts together on plain batches.
`python tests/causal_matrix.py --write` writes this page, and a test fails if it differs from the results.

{table}

Left unchanged, because

{notes}"""


def main() -> None:
    parser = matrix.arguments(__doc__, "all parts together on plain batches alone", f"{ROWS.name} and {PAGE.name}")
    args = parser.parse_args()
    if args.write and (args.quick or args.types):
        parser.error("--write needs every type, without --quick")
    kinds = args.types or causal_models.types()
    rows = matrix.results(kinds, args.kept, lambda kind: kept(kind, args.kept, args.quick))
    if any(row.wrong for row in rows):
        raise SystemExit("some types are wrong; nothing was written")
    if args.write:
        write(rows)


if __name__ == "__main__":
    main()
