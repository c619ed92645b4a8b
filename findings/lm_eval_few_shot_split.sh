#!/usr/bin/env bash
# What: a task without test_split and without fewshot_split, as HellaSwag and WinoGrande, draws one example more than it
#       needs: the harness compares the two names, both None, takes the question for one of the pool, and leaves the last
#       draw out. Naming the split that it uses anyway (`fewshot_split: train`) gives other examples from the second
#       question on, with the same seed, and a pool of exactly num_fewshot rows works only with the name.
# Versions: lm_eval 0.4.13, datasets 5.2.0.
# Source: found by comparing the prompts of two YAMLs over the same files.
# Date: 2026-11-30. Exit code: 0 while it behaves like this, 1 once it does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
python=$work/venv/bin/python
"$python" -m pip install --quiet --no-compile --disable-pip-version-check lm_eval==0.4.13 datasets==5.2.0
mkdir tasks
for file in validation train; do
  for i in $(seq 8); do echo "{\"text\": \"$file $i\", \"choices\": [\"a\", \"b\"], \"gold\": 0}"; done > $file.jsonl
done
for name in unnamed named; do
  cat > tasks/$name.yaml <<YAML
task: few_shot_$name
dataset_path: json
dataset_kwargs: {data_files: {validation: $work/validation.jsonl, train: $work/train.jsonl}}
training_split: train
validation_split: validation
output_type: multiple_choice
doc_to_text: text
doc_to_target: gold
doc_to_choice: choices
metric_list: [{metric: acc}]
YAML
done
echo "fewshot_split: train" >> tasks/named.yaml
cat > ask.py <<'PY'
import sys
from lm_eval.tasks import TaskManager

tasks = TaskManager(include_path="tasks", include_defaults=False).load(["few_shot_unnamed", "few_shot_named"])["tasks"]

def prompts(name, shots):
    task = tasks[f"few_shot_{name}"]
    task.set_fewshot_seed(seed=1234)
    return [task.fewshot_context(doc, shots) for doc in task.eval_docs]

unnamed, named = prompts("unnamed", 4), prompts("named", 4)
same = [a == b for a, b in zip(unnamed, named)]
print("same examples, question by question:", same)
prompts("named", 8)
try:
    prompts("unnamed", 8)
    whole = "drawn"
except ValueError as e:
    whole = str(e)
print("8 examples of a pool of 8, split not named:", whole)
unchanged = same[0] and not any(same[1:]) and "larger than population" in whole
print("unchanged" if unchanged else "CHANGED")
sys.exit(not unchanged)
PY
HF_DATASETS_CACHE=$work/cache "$python" ask.py 2> errors || { cat errors; exit 1; }
