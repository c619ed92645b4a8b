#!/usr/bin/env bash
# What: dataclasses.asdict turns a Counter in a field into another Counter, whose keys are (key, count) pairs and whose
#       counts are all 1. No error, no warning. A plain dict survives; a defaultdict raises TypeError before 3.12.
# Versions: Python 3.11.7 here, 3.10 to 3.13 elsewhere; the script prints the one it runs on. No package is needed.
# Source: found when the counts of a report came back wrong; the documentation of asdict says that dicts are copied.
# Date: 2026-11-29. Exit code: 0 while it behaves like this, 1 once it does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat > counts.py <<'PY'
import platform, sys
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass

@dataclass
class Report:
    counts: object

print("Python", platform.python_version())
print("asdict keeps a dict, and counts the pairs of a Counter")
seen = {}
for value in ({"a": 5, "b": 2}, defaultdict(int, a=5, b=2), Counter(a=5, b=2)):
    try:
        seen[type(value).__name__] = asdict(Report(value))["counts"]
    except TypeError as e:  # defaultdict before Python 3.12
        seen[type(value).__name__] = f"TypeError: {e}"
    print(f"{type(value).__name__}: {seen[type(value).__name__]!r}")
unchanged = seen["Counter"] == Counter({("a", 5): 1, ("b", 2): 1}) and seen["dict"] == {"a": 5, "b": 2}
print("unchanged" if unchanged else "CHANGED")
sys.exit(not unchanged)
PY
python3 counts.py
