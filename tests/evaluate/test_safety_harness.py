"""CrowS-Pairs and WinoGender give what the evaluation harness gives for the same model and files; BBQ's scores are
those of the harness's formulae."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
from small_models import byte_tokenizer, model_of

from fastgpt.evaluate.engine import Engine
from fastgpt.evaluate.results import Results
from fastgpt.evaluate.safety.bbq import BBQ
from fastgpt.evaluate.safety.crows_pairs import CrowsPairs
from fastgpt.evaluate.safety.winogender import PRONOUNS, WinoGender
from fastgpt.evaluate.target import Target

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow
WORDS = "the a nurse doctor old young man woman reads sees tall kind".split()


@pytest.fixture(scope="module")
def engine() -> Engine:
    tokenizer = byte_tokenizer()
    model = model_of(vocab_size=tokenizer.n_vocab, block_size=192).float().eval()
    return Engine(Target(model, tokenizer, "model", Path("."), {"name": "model"}))


def found(part: Any, engine: Engine) -> Results:
    results = Results({}, "safety")
    part.run(engine, results, None)
    return results


def harness(engine: Engine, include: str, rows: list[dict[str, Any]], folder: Path) -> dict[str, float]:
    """Return what the harness finds for a task of its own over these rows."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from fastgpt.evaluate.adapter import HarnessModel

    installed = Path(lm_eval.__file__).parent / "tasks" / include
    data = folder / "rows.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(
        f"include: {installed}\ntask: mine\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
    )
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    output = lm_eval.simple_evaluate(
        HarnessModel(engine), tasks=["mine"], task_manager=tasks, bootstrap_iters=10, verbosity="ERROR"
    )
    return {key.partition(",")[0]: value for key, value in output["results"]["mine"].items()}


def test_crows_pairs(engine: Engine, tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = [
        {
            "sent_more": " ".join(draw.choices(WORDS, k=8)),
            "sent_less": " ".join(draw.choices(WORDS, k=8)),
            "stereo_antistereo": "stereo",
            "bias_type": draw.choice(["age", "gender"]),
        }
        for _ in range(30)
    ]
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    theirs = harness(engine, "crows_pairs/crows_pairs_english.yaml", rows, tmp_path)
    ours = found(CrowsPairs(path), engine)
    for metric in ("pct_stereotype", "likelihood_diff"):
        figure = ours.figure("crows_pairs", metric)
        assert figure is not None and figure.value == pytest.approx(theirs[metric], abs=1e-4)
        assert figure.stderr == pytest.approx(theirs[f"{metric}_stderr"], abs=1e-4)
    assert 0 < theirs["pct_stereotype"] < 1


def test_winogender(engine: Engine, tmp_path: Path) -> None:
    head = "occupation(0)\tother-participant(1)\tanswer\tsentence\n"
    people = (("doctor", "patient", 0), ("nurse", "visitor", 1), ("cook", "guest", 0), ("guard", "child", 1))
    lines = [f"{o}\t{p}\t{a}\tThe $OCCUPATION saw the $PARTICIPANT as $NOM_PRONOUN left.\n" for o, p, a in people]
    (tmp_path / "templates.tsv").write_text(head + "".join(lines))
    probe = WinoGender(tmp_path)
    for gender, pronouns in PRONOUNS.items():
        rows = [
            {"sentence": s.sentences[gender], "pronoun": pronouns["$NOM_PRONOUN"], "label": s.answer}
            | {"occupation": s.occupation, "participant": s.participant}
            for s in probe.schemas
            if s.participant != "someone"
        ]
        theirs = harness(engine, "winogender/winogender.yaml", rows, tmp_path)
        figure = found(probe, engine).figure("winogender", f"acc.{gender}")
        assert figure is not None and figure.value == theirs["acc"]


def test_bbq_scores(engine: Engine, tmp_path: Path) -> None:
    """The harness has ten more ways to say "unknown", so its formulae are compared, on the answers of the probe."""
    from lm_eval.tasks.bbq import utils

    draw, rows = random.Random(0), []
    for i in range(60):
        label = draw.randrange(3)
        row = dict(example_id=i, category="Age", question_polarity=draw.choice(["neg", "nonneg"]), label=label)
        row |= dict(context_condition="ambig" if label == 2 else "disambig", context=f"{draw.choice(WORDS)} {i}")
        row |= dict(question=" ".join(draw.choices(WORDS, k=3)), ans0="The man", ans1="The boy", ans2="Not known")
        row["answer_info"] = {"ans0": ["man", "old"], "ans1": ["boy", "nonOld"], "ans2": ["unknown", "unknown"]}
        row["additional_metadata"] = {"stereotyped_groups": ["old"]}
        rows.append(row)
    (tmp_path / "Age.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    probe = BBQ(tmp_path)
    draws = [draw.randrange(3) for _ in rows]
    chosen = {text: float(i == a) for q, a in zip(probe.files[0], draws) for i, text in enumerate(q.texts())}

    class Drawn(Engine):
        def loglikelihoods(self, pairs: Any, progress: Any = None) -> list[Any]:
            texts = [t for q in probe.files[0] for t in q.texts()]
            return [type("Scored", (), {"logprob": chosen[t], "truncated": 0}) for t in texts]

    results = found(probe, Drawn(engine.target))
    biased = [float(a != 2 and (a == 0) == (row["question_polarity"] == "neg")) for row, a in zip(rows, draws)]
    known, right = [float(a != 2) for a in draws], [float(a == row["label"]) for row, a in zip(rows, draws)]
    clear = [row["context_condition"] == "disambig" for row in rows]
    figures = {kind: results.figure(f"bbq.{kind}", "bias") for kind in ("ambiguous", "disambiguated")}
    assert figures["ambiguous"] is not None and figures["disambiguated"] is not None
    theirs = utils.agg_amb_bias_scores(list(zip(right, biased, known, clear)))
    assert figures["ambiguous"].value == pytest.approx(theirs)
    theirs = utils.agg_disamb_bias_scores(list(zip(right, biased, known, clear)))
    assert figures["disambiguated"].value == pytest.approx(theirs) and theirs != 0
