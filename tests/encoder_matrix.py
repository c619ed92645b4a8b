"""What fastgpt.patch replaces in each encoder and encoder-decoder of transformers: check it, and write
docs/encoders.md.

`python tests/encoder_matrix.py [--kept FOLDER] [TYPE ...]` checks the types and keeps each result in a folder, from
which the next run goes on. `--write` writes the page.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import encoder_models
import torch
from causal_matrix import EPS, NEW, Row
from causal_models import VOCAB
from encoder_models import CLASSES
from hf_parity import InFp64, excess
from torch import Tensor

import fastgpt
from fastgpt.patching import PARTS

PAGE = Path(__file__).parent.parent / "docs" / "encoders.md"
GROUPS = ("bart", "bert", "modernbert", "mt5", "t5gemma", "vit", "whisper")  # the patterns that others lack


def outcome(model: Any, name: str, seed: int = 0) -> dict[str, Tensor]:
    """Return logits, losses of several sets of labels, and every gradient of the first one, for one kind of input."""
    wide = next(model.parameters()).dtype
    given = encoder_models.inputs_of(model, name, seed)
    given = {n: t.to(wide) if t.is_floating_point() else t for n, t in given.items()}
    labels = encoder_models.labels_of(model, seed)
    model.train()
    loss = model(**given, labels=labels).loss
    names, params = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    out = {f"d{n}": g for n, g in zip(names, grads) if g is not None}
    classes, sets = (CLASSES, CLASSES) if labels.dim() == 1 else (VOCAB, 2)
    with torch.no_grad():
        shifts = range(0, classes, -(-classes // sets))
        others = [torch.where(labels == -100, -100, (labels + shift) % classes) for shift in shifts]
        out["losses"] = torch.stack([model(**given, labels=s).loss.double() for s in others])
        model.eval()
        out["logits"] = model(**given, **decoder_inputs(model, seed)).logits
    return out


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
    row = Row(kind, type(model).__name__)
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
            _strictly(row, patched, name)
        if only is None and name == "plain":
            fresh = fastgpt.patch(copy.deepcopy(model), quiet=True)
            after = outcome(fastgpt.unpatch(fresh), name)
            row.wrong += [f"unpatched: {n}" for n, t in base.items() if not torch.equal(after[n], t)][:3]
            row.error = float((base["logits"] - truth["logits"]).abs().max())


def _again(model: Any, only: str | None, name: str) -> dict[str, float]:
    """Return what breaks the rule over several batches together: an error is a random number, and that of a small
    tensor may be small by chance in one batch."""
    sides: list[dict[str, list[Tensor]]] = [{}, {}, {}]
    for seed in range(1, 6):
        patched = fastgpt.patch(copy.deepcopy(model), only=only, quiet=True)
        runs = outcome(patched, name, seed), outcome(copy.deepcopy(model), name, seed), exact(model, name, seed)
        for side, out in zip(sides, runs):
            for n, t in out.items():
                side.setdefault(n, []).append(t.double().flatten())
    shared = [n for n in sides[2] if all(len(side.get(n, ())) == 5 for side in sides)]
    return excess(*without_zeros(*({n: torch.cat(side[n]) for n in shared} for side in sides)), eps=EPS)


def without_zeros(*sides: dict[str, Tensor]) -> Any:
    """Leave out the gradients that are zero but for rounding (a bias before a norm over its columns), within the 32
    units in the last place that the rule of parity has for zero: (ours, base, truth) -> the same."""
    norms = {n: float(t.norm()) for n, t in sides[-1].items()}
    least = 32 * EPS * max((v for n, v in norms.items() if n.startswith("d")), default=0.0)
    return ({n: t for n, t in side.items() if not (n.startswith("d") and norms[n] <= least)} for side in sides)


def _strictly(row: Row, patched: Any, name: str) -> None:
    """Run a patched model where falling back to PyTorch is an error; what does that is left after all."""
    given = encoder_models.inputs_of(patched, name)
    for more in ({"labels": encoder_models.labels_of(patched)}, decoder_inputs(patched, 0)):
        try:
            with fastgpt.ops.use(strict=True):
                patched.train("labels" in more)(**given, **more)
        except RuntimeError as e:
            op, _, why = str(e).partition(": ")
            part = next((p for p, ops in row.ops.items() if op in ops), "attention")
            row.left[part] = sorted({*row.left[part], why.partition(": only PyTorch")[0]})


def _generate(row: Row, model: Any) -> None:
    """Compare greedy generation with the cache, as far as no token is a close call."""
    settings: dict[str, Any] = dict(max_new_tokens=NEW, do_sample=False, output_logits=True)
    settings |= dict(return_dict_in_generate=True, eos_token_id=None, pad_token_id=0, use_cache=True)
    for name in encoder_models.kinds(model)[:2]:
        given = encoder_models.inputs_of(model, name)
        try:
            wanted = model.generate(**given, **settings)
        except Exception as e:
            row.notes.append(f"generation: {_line(e)}")
            return
        try:
            got = fastgpt.patch(copy.deepcopy(model), quiet=True).generate(**given, **settings)
        except Exception as e:
            row.wrong.append(f"generation, {name}: {_line(e)}")
            continue
        logits = torch.stack(wanted.logits, 1)  # (B, NEW, V)
        top = logits.topk(2, -1).values
        allowed = 2 * row.error + EPS * float(logits.abs().max())
        clear = (top[..., 0] - top[..., 1] > 10 * allowed).long().cumprod(1).bool()
        if (got.sequences[:, -NEW:] != wanted.sequences[:, -NEW:])[clear].any():
            row.wrong.append(f"generation, {name}: other tokens")


def uncompared(row: Row) -> str:
    """Return why not even plain batches were compared; empty if they were."""
    return next((n for n in row.notes if n.startswith("plain")), "")


def _line(e: Exception) -> str:
    return f"{type(e).__name__}: {' '.join(str(e).split()).split('. ')[0][:120]}"


def kept(kind: str, folder: Path | None, quick: bool = False) -> Row:
    """Return the result of a type, from the folder if it is there; an exception of the type itself is a note."""
    path = folder / f"{kind}{'.quick' if quick else ''}.json" if folder else None
    if path and path.exists():
        return Row(**json.loads(path.read_text()))
    torch.manual_seed(0)
    try:
        row = check(kind, quick)
    except Exception as e:
        row = Row(kind, notes=[f"not built: {_line(e)}"])
    if path:
        path.write_text(json.dumps(asdict(row), indent=1) + "\n")
    return row


def page(rows: list[Row], quick: bool) -> str:
    """Return docs/encoders.md; quick: how the rows were compared."""
    notes: list[str] = []

    def number(text: str) -> int:
        if text not in notes:
            notes.append(text)
        return notes.index(text) + 1

    lines = []
    for row in rows:
        cells = []
        for part in PARTS:
            ops = ", ".join(f"`{op}`" for op in row.ops.get(part, []))
            left = "".join(f" [{number(why)}]" for why in row.left.get(part, []))
            cells.append(f"{ops}{', ' if ops and left else ''}{'left' if left else ''}{left}" or "none")
        if not row.ops:
            cells = [f"left [{number(row.notes[0])}]"] * len(PARTS)
        elif uncompared(row):
            cells[0] += f", not compared [{number(uncompared(row))}]"
        lines.append(f"| {row.kind}{' **WRONG**' if row.wrong else ''} | {' | '.join(cells)} |")
    nothing = sum(bool(r.ops) and not any(r.ops.values()) and not any(r.left.values()) for r in rows)
    full, wrong = sum(r.full for r in rows) - nothing, sum(bool(r.wrong) for r in rows)
    return ABOUT.format(
        full=full, partly=len(rows) - full - wrong - nothing, wrong=wrong, types=len(rows), nothing=nothing,
        parts=" | ".join(PARTS), rule="---|" * (len(PARTS) + 1), rows="\n".join(lines),
        notes="".join(f"{i}. {note}\n" for i, note in enumerate(notes, 1)),
        how=QUICK if quick else "",
    )  # fmt: skip


QUICK = """ It was last written with `--quick`, which compares all parts together on plain and right-padded batches
and nothing else; the rest is compared by that test."""
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

`python tests/encoder_matrix.py --write` writes this page, and a test marked `extended` fails if it differs from the
results.{how}

| type | {parts} |
|{rule}
{rows}

Left unchanged, because

{notes}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="default: all")
    parser.add_argument("--quick", action="store_true", help="compare all parts together alone, without generation")
    parser.add_argument("--kept", type=Path, help="folder of results to go on from")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    args = parser.parse_args()
    if args.write and args.types:
        parser.error("--write needs every type")
    warnings.simplefilter("ignore")
    if args.kept:
        args.kept.mkdir(parents=True, exist_ok=True)
    rows = []
    for kind in args.types or encoder_models.types():
        rows.append(kept(kind, args.kept, args.quick))
        row = rows[-1]
        state = "full" if row.full else "WRONG" if row.wrong else "partly" if row.ops else "NOT BUILT"
        left = {p: w for p, w in row.left.items() if w}
        print(f"{kind}: {state} {left or ''} {row.wrong or ''} {row.notes or ''}", flush=True)
    if args.write:
        PAGE.write_text(page(rows, args.quick), encoding="utf-8")


if __name__ == "__main__":
    main()
