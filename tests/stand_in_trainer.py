"""A stand-in for fastgpt.sweep.child that starts in milliseconds: its loss follows from learning rate, seed and step.

It fails as `fastgpt train` does for lr above 0.1, and its loss is not a number for weight_decay 0.5. STAND_IN_SECONDS
is the time of a step, STAND_IN_HOPELESS that of one after the first validation with lr below 1e-4. SIGTERM writes a
checkpoint, from which the next start resumes.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

folder = Path(sys.argv[1])
given = dict(word[2:].split("=", 1) for word in sys.argv[2:])
lr, seed, last = float(given["lr"]), int(given["seed"]), int(given["max_steps"])
asked: list[int] = []
signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))

with (folder / "starts.txt").open("a") as file:
    file.write("started\n")
if lr > 0.1:
    print("step 1\nfastgpt: error: out of memory on cpu: the largest part of the plan is activations", file=sys.stderr)
    sys.exit(2)

done = max((int(path.name[5:]) for path in folder.glob("step_*")), default=0)
metrics = folder / "metrics.jsonl"
rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
metrics.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= done))
(folder / "run.json").write_text(json.dumps({"machine": {"device_name": "a device", "torch": "2", "commit": "abc"}}))
every = int(given["eval_every"])
with metrics.open("a") as file:
    for step in range(done + 1, last + 1):
        name = "STAND_IN_HOPELESS" if lr < 1e-4 and step > every else "STAND_IN_SECONDS"
        end = time.monotonic() + float(os.environ.get(name, "0"))
        while time.monotonic() < end and not asked:
            time.sleep(0.005)
        loss = abs(math.log10(lr / 0.003)) + 3 / step + seed / 1000
        row = {"step": step, "loss": loss, "seconds": step / 2, "tokens_per_second": 100.0, "grad_norm": 1.0}
        file.write(json.dumps(row) + "\n")
        if step % every == 0 or step == last:
            file.write(json.dumps({"step": step, "val_loss": loss}) + "\n")
        file.flush()
        if asked:
            (folder / f"step_{step:08d}").mkdir()
            print(f"stopped at step {step}")
            sys.exit(0)
    if given.get("weight_decay") == "0.5":
        file.write(json.dumps({"step": last, "val_loss": math.nan}) + "\n")
(folder / f"step_{last:08d}").mkdir(exist_ok=True)
(folder / "samples.txt").write_text("the end")
