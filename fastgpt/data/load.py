"""Read the tokenizer of a folder, whichever files describe it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastgpt.core.errors import UserError
from fastgpt.data.byte_level import ByteLevelTokenizer
from fastgpt.data.corpus import EOT
from fastgpt.data.pieces import PieceTokenizer
from fastgpt.data.sentencepiece_file import read_model, tokenizer_json
from fastgpt.data.tokenizer import Tokenizer, readable

FILE, MODEL, OLD = "tokenizer.json", "tokenizer.model", ("vocab.json", "merges.txt")
SETTINGS, SPECIALS, GENERATION = "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"
TEMPLATE = "chat_template.jinja"
COMPANIONS = (SETTINGS, SPECIALS, GENERATION, TEMPLATE)
KINDS: tuple[Callable[[str, str, str], Tokenizer], ...] = (ByteLevelTokenizer, PieceTokenizer)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read the tokenizer in a folder, or a tokenizer.json: GPT-2's kind, another byte-level BPE, or SentencePiece's.

    A folder may have tokenizer.json, SentencePiece's tokenizer.model, or vocab.json and merges.txt of GPT-2. What ends
    a text is the eos_token of tokenizer_config.json or special_tokens_map.json, else `<|endoftext|>` or `</s>`; the
    ids in generation_config.json are `ends`.

    Raises:
        UserError: files are missing, damaged or of another kind, or nothing is known to end a text.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    settings = {name: _read(folder / name) for name in (SETTINGS, SPECIALS, GENERATION)}
    text, where = _json_of(folder, path, settings)
    eos, bos = (_content(settings[SETTINGS].get(k) or settings[SPECIALS].get(k)) for k in ("eos_token", "bos_token"))
    tokenizer = _tokenizer(text, where, eos)
    tokenizer.bos = bos or tokenizer.decode(tokenizer.prefix)
    ends = settings[GENERATION].get("eos_token_id")
    if ends is not None:
        tokenizer.ends = tuple(ends) if isinstance(ends, list) else (ends,)
        if not all(isinstance(i, int) for i in tokenizer.ends):
            raise UserError(f"{folder / GENERATION} has eos_token_id {ends!r}, expected a number or a list of them")
    tokenizer.companions = companions = {
        name: (folder / name).read_text(encoding="utf-8") for name in COMPANIONS if (folder / name).is_file()
    }
    if TEMPLATE not in companions and (template := _template(settings[SETTINGS].get("chat_template"))):
        companions[TEMPLATE] = template
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has the files of a tokenizer."""
    return any((folder / name).is_file() for name in (FILE, MODEL)) or all((folder / name).is_file() for name in OLD)


def _json_of(folder: Path, path: Path, settings: dict[str, dict[str, Any]]) -> tuple[str, str]:
    """Return the content of the tokenizer.json, made from older files where there is none, and its source."""
    path = path / FILE if path.is_dir() else path
    model, (vocabulary, merges) = folder / MODEL, (folder / name for name in OLD)
    with readable(path):
        if path.is_file() or not has_tokenizer(folder):
            return path.read_text(encoding="utf-8"), str(path)
        if model.is_file():
            add_bos = settings[SETTINGS].get("add_bos_token", True)
            return tokenizer_json(read_model(model.read_bytes(), str(model)), bool(add_bos)), str(model)
        return _from_old(_read(vocabulary), merges.read_text(encoding="utf-8"), settings, folder), str(vocabulary)


def _tokenizer(text: str, where: str, eos: str | None) -> Tokenizer:
    """Return the first kind of tokenizer that reads a tokenizer.json."""
    try:
        tokenizer = Tokenizer(text, where)
    except UserError as e:
        reasons = [str(e)]
    else:
        if eos is None or eos in tokenizer.specials:
            tokenizer.eot = tokenizer.eot if eos is None else tokenizer.specials[eos]
            tokenizer.ends = (tokenizer.eot,)
            return tokenizer
        raise UserError(f"{where} has no special token {eos!r}, which {SETTINGS} names as eos_token")
    specials: list[str] = []
    with suppress(ValueError, KeyError, TypeError):
        specials = [t["content"] for t in json.loads(text)["added_tokens"]]
    eos = eos or next((token for token in (EOT, "</s>", "<eos>") if token in specials), None)
    if eos is None:
        raise UserError(f"{reasons[0]}, and no {SETTINGS} names the eos_token of another kind")
    for kind in KINDS:
        try:
            return kind(text, where, eos)
        except UserError as e:
            reasons.append(str(e))
    told = [r.removeprefix(f"{where} ") for r in reasons[1:]]
    raise UserError(f"{where} {', and it '.join(dict.fromkeys(told))}")


def _from_old(vocabulary: dict[str, int], merges: str, settings: dict[str, dict[str, Any]], folder: Path) -> str:
    """Return the tokenizer.json of GPT-2's vocab.json and merges.txt."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    pairs = [tuple(line.split(" ")) for line in merges.splitlines() if line and not line.startswith("#version")]
    names = {**settings[SPECIALS], **settings[SETTINGS]}
    given = {k: _content(names.get(f"{k}_token")) for k in ("eos", "bos", "unk", "pad")}
    more = [_content(t) for t in names.get("additional_special_tokens") or ()]
    specials = {t for t in (EOT, *given.values(), *more) if t}
    added = _read(folder / "added_tokens.json")
    try:
        made = Tokenizer(models.BPE(vocabulary, pairs))  # type: ignore[arg-type]
    except Exception as e:  # tokenizers raises no class of its own
        raise UserError(f"{folder} has a damaged vocab.json or merges.txt ({e})") from None
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(names.get("add_prefix_space", False)))
    made.decoder = decoders.ByteLevel()
    for token in sorted(added, key=lambda t: int(added[t])):
        made.add_tokens([AddedToken(token, normalized=False, special=token in specials)])
    known = [t for t in specials if made.token_to_id(t) is not None]
    made.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in sorted(known)])
    bos = given["bos"] or EOT
    if names.get("add_bos_token"):
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, made.token_to_id(bos))]
        )
    return str(made.to_str(pretty=True))


def _template(given: Any) -> str | None:
    """Return the chat template of a tokenizer_config.json: a text, or the default one of several with names."""
    if isinstance(given, list):
        given = next((t["template"] for t in given if isinstance(t, dict) and t.get("name") == "default"), None)
    return given if isinstance(given, str) else None


def _content(token: Any) -> str | None:
    """Return the text of a token, which newer files describe by a dictionary."""
    return token.get("content") if isinstance(token, dict) else None if token is None else str(token)


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file, empty where there is none.

    Raises:
        UserError: it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
    except FileNotFoundError:
        return {}
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e
    except ValueError as e:
        raise UserError(f"{path} is damaged ({e})") from e
    return content
