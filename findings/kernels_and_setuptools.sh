#!/usr/bin/env bash
# What: with Hugging Face's kernels installed, setuptools cannot build a project that has a package of its own called
#       kernels, because kernels registers a writer of egg-info, setuptools loads every registered writer, and Python
#       looks for kernels.locking in the project.
# Versions: kernels 0.17.2, setuptools 84.2.1.
# Source: found while building a project with a folder kernels/; huggingface/kernels#829 mended another fault of the
#         same entry point.
# Date: 2026-11-29. Exit code: 0 while the two behave like this, 1 once they do not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
python=$work/venv/bin/python
install() { "$python" -m pip install --quiet --no-compile --disable-pip-version-check "$@"; }
install setuptools==84.2.1 wheel

for name in kernels filters; do
  mkdir -p "project-$name/$name"
  touch "project-$name/$name/__init__.py"
  printf 'from setuptools import setup\nsetup(name="demo", version="1", packages=["%s"])\n' "$name" \
    > "project-$name/setup.py"
done
egg_info() { # egg_info NAME: prints the last line of the build, or "built"
  (cd "project-$1" && "$python" setup.py --quiet egg_info 2>&1 || true) | tail -n 1 | sed 's/^$/built/'
}
report() { # report WHEN: both projects
  for name in kernels filters; do
    line=$(egg_info "$name")
    printf '%-22s project with a package %-8s %s\n' "$1" "$name:" "${line:-built}"
  done
}
{
  report "without HF kernels,"
  install kernels==0.17.2
  report "with HF kernels,"
} > seen
"$python" -m pip list --disable-pip-version-check 2> /dev/null | grep -E '^(kernels|setuptools) '
echo "installing kernels breaks the build of a project that has a package of the same name, and of no other"
cat seen
sed 's/.*: *//' seen > lines
if printf "built\nbuilt\nNo module named 'kernels.locking'\nbuilt\n" | cmp --silent - lines; then
  echo unchanged
else
  echo CHANGED
  exit 1
fi
