#!/usr/bin/env bash
# What: xgrammar compiles a JSON schema with keywords that it does not enforce (not, uniqueItems, dependentRequired),
#       without an error or a warning, and then accepts texts that break the schema. llguidance refuses such a schema.
# Versions: xgrammar 0.2.9, llguidance 1.9.1.
# Source: found while choosing a library for structured output.
# Date: 2026-11-30. Exit code: 0 while it behaves like this, 1 once it does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
python=$work/venv/bin/python
"$python" -m pip install --quiet --no-compile --disable-pip-version-check xgrammar==0.2.9 llguidance==1.9.1
cat > keywords.py <<'PY'
import json, sys
import llguidance, xgrammar

CASES = {
    "not": ({"type": "integer", "not": {"const": 1}}, "1"),
    "uniqueItems": ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "[1, 1]"),
    "dependentRequired": ({"type": "object", "properties": {"a": {"type": "integer"}},
                           "dependentRequired": {"a": ["b"]}}, '{"a": 1}'),
}
tokens = [bytes([i]) for i in range(256)] + [b"</s>"]
about = xgrammar.TokenizerInfo(tokens, xgrammar.VocabType.RAW, vocab_size=257, stop_token_ids=[256])
compiler = xgrammar.GrammarCompiler(about)
silent = True
for keyword, (schema, text) in CASES.items():
    matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(json.dumps(schema)))
    accepted = matcher.accept_string(text) and matcher.accept_token(256)
    grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)
    why = llguidance.LLMatcher.validate_grammar(grammar)
    print(f"{keyword}: xgrammar accepts {text}: {accepted}; llguidance: {why or 'accepts it, too'}")
    silent &= accepted and bool(why)
print("unchanged" if silent else "CHANGED")
sys.exit(not silent)
PY
"$python" keywords.py
