"""Log the start of a run."""

from __future__ import annotations

import json
from typing import Any

from fastgpt.core import backend
from fastgpt.core.device import describe_machine
from fastgpt.training.run import Run
from fastgpt.training.runlog import Log, Quiet


def start_log(run: Run, changed: list[str]) -> Log:
    """Write run.json and the tokenizer to the run's folder, open its log and print what will run.

    Args:
        changed: the settings that differ from the resumed checkpoint, as Run.resume returns them.
    """
    if not run.mesh.main:
        return Quiet(run.folder)
    run.folder.mkdir(parents=True, exist_ok=True)
    dtype = next(run.model.parameters()).dtype
    kernels = {op: backend.explain(op, run.device.type, dtype) for op in backend.ops()}
    header: dict[str, Any] = {
        "config": run.settings(),
        "machine": describe_machine(run.device),
        "data": run.data.describe(),
    }
    header["kernels"], header["licences"] = kernels, run.data.licences
    (run.folder / "run.json").write_text(json.dumps(header, indent=1), encoding="utf-8")
    if run.data.tokenizer is not None:  # so `fastgpt sample` needs nothing but the run folder
        run.data.tokenizer.save(run.folder / "tokenizer.json")
    p = run.progress
    spread = f" and {run.mesh.world - 1} more ({run.cfg.parallel})" if run.mesh.world > 1 else ""
    log = Log(run.folder, run.cfg, p.step, p.last_step)
    log.say(
        f"{run.folder}: {run.model.num_params():,} parameters, {run.data.describe()}, device {run.device}{spread}, "
        f"kernels {', '.join(f'{op} {picked}' for op, (picked, _) in kernels.items())}"
    )
    if p.step:
        length = f" of {p.last_step}" if p.length_known else ""
        log.say(
            f"resumed at step {p.step}{length}" + (f"; changed since then: {', '.join(changed)}" if changed else "")
        )
    log.say(run.ends())
    return log
