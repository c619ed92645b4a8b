#!/usr/bin/env bash
# What: in a task of output_type loglikelihood the harness puts target_delimiter (a space by default) between prompt and
#       answer of the examples, but not before the answer that it scores: after "The capital of France is Paris" the
#       model is asked for "Rome" directly behind "is", without a space. multiple_choice puts it before both.
# Versions: lm_eval 0.4.13, datasets 5.2.0.
# Source: found while exporting cloze items; tasks such as LAMBADA write the space into doc_to_target by hand.
# Date: 2026-11-30. Exit code: 0 while it behaves like this, 1 once it does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
python=$work/venv/bin/python
"$python" -m pip install --quiet --no-compile --disable-pip-version-check lm_eval==0.4.13 datasets==5.2.0
mkdir tasks
cat > items.jsonl <<'JSON'
{"text": "The capital of Italy is", "answer": "Rome", "choices": ["Rome", "Milan"], "gold": 0}
JSON
cat > pool.jsonl <<'JSON'
{"text": "The capital of France is", "answer": "Paris", "choices": ["Paris", "Lyon"], "gold": 0}
JSON
for kind in loglikelihood multiple_choice; do
  cat > tasks/$kind.yaml <<YAML
task: capitals_$kind
dataset_path: json
dataset_kwargs: {data_files: {test: $work/items.jsonl, pool: $work/pool.jsonl}}
test_split: test
fewshot_split: pool
fewshot_config: {sampler: first_n}
num_fewshot: 1
output_type: $kind
doc_to_text: text
metric_list: [{metric: acc}]
YAML
done
echo "doc_to_target: answer" >> tasks/loglikelihood.yaml
printf 'doc_to_target: gold\ndoc_to_choice: choices\n' >> tasks/multiple_choice.yaml
cat > ask.py <<'PY'
import sys
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

class Asked(LM):
    """Answers nothing, and keeps what it is asked."""

    def loglikelihood(self, requests):
        self.asked = [request.args for request in requests]
        return [(-1.0, False) for _ in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        raise NotImplementedError

tasks, found = TaskManager(include_path="tasks", include_defaults=False), {}
for kind in ("loglikelihood", "multiple_choice"):
    model = Asked()
    simple_evaluate(model, tasks=[f"capitals_{kind}"], task_manager=tasks, bootstrap_iters=0)
    found[kind] = model.asked[0]
    print(kind, *map(repr, found[kind]))
context = "The capital of France is Paris\n\nThe capital of Italy is"
unchanged = found == {"loglikelihood": (context, "Rome"), "multiple_choice": (context, " Rome")}
print("unchanged" if unchanged else "CHANGED")
sys.exit(not unchanged)
PY
HF_DATASETS_CACHE=$work/cache "$python" ask.py 2> errors || { cat errors; exit 1; }
