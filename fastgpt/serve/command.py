"""`fastgpt serve`: options, models, and the HTTP server."""

from __future__ import annotations

import argparse
import os
import signal
import socket
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fastgpt.core.command import Parser, number
from fastgpt.core.errors import UserError, cause_of
from fastgpt.serve.rollout import options as rollout
from fastgpt.serve.watch import options as watching

if TYPE_CHECKING:
    from fastgpt.serve.served import Served

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def main(argv: list[str]) -> int:
    """Run `fastgpt serve` until a signal stops it; requests that run are finished."""
    args = _parser().parse_args(argv)
    _require_libraries()
    import uvicorn

    from fastgpt.serve.app import Part, build_app
    from fastgpt.serve.engine import Model
    from fastgpt.serve.guard import Limits
    from fastgpt.serve.rollout.swap import Rollouts
    from fastgpt.serve.served import serve_adapter, serve_model
    from fastgpt.serve.shadow import Shadow

    places = named([args.run, *args.model])
    adapters = named_adapters(args.adapter, places)
    first, *_ = places
    changing = [first] if args.allow_adapter_changes else []
    rollout.check(args, [path for name, path in places.items() if adapters[name] or name in changing])
    changes = folder_of(args.allow_adapter_changes)
    keys, watchers = read_keys(args.api_key_file), watching.watchers_of(args)
    limits = Limits(args.max_body, args.timeout, keys)
    listening = listen(args.host, args.port, args.timeout)  # first: loading a model takes longer

    cache = {"cache_tokens": args.cache_tokens, "reuse": not args.no_reuse}
    engine = Model("", args.device, args.weights, args.rows, args.context, args.threads, **cache)

    def start(name: str, path: str) -> Served:
        return serve_model(name, replace(engine, path=path, adapters=adapters[name]), args.queue)

    models: dict[str, Served] = {}
    rollouts = Rollouts(start)
    parts: list[Part] = [*watchers, rollouts.add, *rollout.feedback_of(args)]
    shadows: list[Shadow] = []
    try:
        for name, path in places.items():
            models[name] = rollouts.open(name, path)
        for base, own in adapters.items():
            models |= {name: serve_adapter(name, path, models[base]) for name, path in own.items()}
        shadows = rollout.shadow_of(args, next(iter(models)), engine, args.queue)
        _announce(models.values(), args.host, listening, keys)
        signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again when it has ended
        app = build_app(models, limits, changes, [*parts, *(shadow.add for shadow in shadows)])
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=args.grace, server_header=False)
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        for served in [*models.values(), *(shadow.candidate for shadow in shadows)]:
            served.link.close()
        listening.close()
    return 0


def _require_libraries() -> None:
    """Raise UserError if a library of the extra is missing."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as e:
        raise UserError(f"serve needs {e.name}, expected `pip install fastgpt[serve]`") from None


def _announce(models: Iterable[Served], host: str, listening: socket.socket, keys: tuple[str, ...]) -> None:
    """Print what is served, and where."""
    if host not in LOOPBACK and not keys:
        print(f"warning: anyone who reaches {host} may use the server; set FASTGPT_API_KEYS or --api-key-file")
    for served in models:
        print(f"model {served.name}: {served.root}, {served.context} tokens")
    shown = f"[{host}]" if ":" in host else host
    print(f"serving at http://{shown}:{listening.getsockname()[1]}; Ctrl-C ends it", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="fastgpt serve", description="Serve models over HTTP, as OpenAI's API does.")
    parser.add_argument("run", metavar="[NAME=]RUN", help="run, checkpoint, folder of a model, or deployment")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=RUN", help="a further model")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME[@MODEL]=PATH",
        help="a LoRA adapter of a model, by name (default: of the first model)",
    )
    parser.add_argument(
        "--allow-adapter-changes", metavar="DIR", help="let clients load adapters in this folder, and unload them"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=number(int, 0, 65535), default=8000, help="0 takes a free one (default: 8000)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--weights", choices=("fp32", "bf16", "int8"), help="convert the weights (default: as stored)")
    parser.add_argument("--context", type=number(int, 1), help="most tokens of a text (default: as the model trained)")
    parser.add_argument("--rows", type=number(int, 1), default=16, help="requests that run at a time (default: 16)")
    parser.add_argument(
        "--cache-tokens",
        type=number(int, 1),
        metavar="N",
        help="tokens of all texts in the cache (default: --rows texts of the whole context)",
    )
    parser.add_argument("--no-reuse", action="store_true", help="read prompts whole, whatever was read before")
    parser.add_argument("--queue", type=number(int, 0), default=64, help="requests that may wait (default: 64)")
    parser.add_argument("--threads", type=number(int, 1), help="of PyTorch, for each model (default: all cores)")
    parser.add_argument(
        "--timeout", type=number(float, 0, open_least=True), default=600.0, help="seconds of a request (default: 600)"
    )
    parser.add_argument(
        "--grace", type=number(int, 0), default=60, help="seconds to finish requests when the server ends (default: 60)"
    )
    parser.add_argument(
        "--max-body", type=number(int, 1), default=1 << 22, metavar="BYTES", help="largest request (default: 4 MiB)"
    )
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="one key on each line; FASTGPT_API_KEYS has them, too"
    )
    rollout.add_options(parser)
    watching.add_options(parser)
    return parser


def named(places: list[str]) -> dict[str, str]:
    """Return the paths of models by name, NAME=PATH; without a name it is the folder's.

    Raises:
        UserError: a name is empty or given twice.
    """
    found: dict[str, str] = {}
    for place in places:
        name, equal, path = place.partition("=")
        if not equal:
            name, path = Path(place).resolve().name, place
        if not name or not path:
            raise UserError(f"{place!r} is not a model, expected NAME=RUN")
        if name in found:
            raise UserError(f"two models are named {name}, expected NAME=RUN with different names")
        found[name] = path
    return found


def named_adapters(places: list[str], models: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return for each model the paths of its adapters by name, of NAME=PATH, the first model's, and NAME@MODEL=PATH.

    Raises:
        UserError: a name is missing, given twice, or that of a model, or there is no such model.
    """
    found: dict[str, dict[str, str]] = {model: {} for model in models}
    taken = set(found)
    for place in places:
        named, _, path = place.partition("=")
        name, at, model = named.rpartition("@") if "@" in named else (named, "", next(iter(found)))
        if not name or not path or (at and not model):
            raise UserError(f"--adapter is {place!r}, expected NAME=PATH or NAME@MODEL=PATH")
        if model not in found:
            raise UserError(f"--adapter is {place!r}, but there is no model {model}, expected {', '.join(found)}")
        if name in taken:
            raise UserError(f"--adapter: two models are named {name}, expected different names")
        taken.add(name)
        found[model][name] = path
    return found


def folder_of(path: str | None) -> Path | None:
    """Return the folder of --allow-adapter-changes.

    Raises:
        UserError: it does not exist.
    """
    if path is not None and not Path(path).is_dir():
        raise UserError(f"--allow-adapter-changes is {path!r}, expected a folder")
    return None if path is None else Path(path)


def read_keys(file: Path | None) -> tuple[str, ...]:
    """Return the API keys of the environment and of a file.

    Raises:
        UserError: the file cannot be read or has no key, or a key is not ASCII.
    """
    keys = [key.strip() for key in os.environ.get("FASTGPT_API_KEYS", "").split(",") if key.strip()]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"--api-key-file: {file} cannot be read ({cause_of(e)})") from None
        own = [line.strip() for line in lines if line.strip()]
        if not own:
            raise UserError(f"--api-key-file: {file} has no key, expected one on each line")
        keys += own
    if any(not key.isascii() for key in keys):
        raise UserError("an API key is not ASCII, expected letters, digits and signs")
    return tuple(keys)


def listen(host: str, port: int, stalled: float = 600.0) -> socket.socket:
    """Return a socket that listens. A connection whose client takes no data for `stalled` seconds is dropped, where the
    system can (Linux).

    Raises:
        UserError: the port is in use, or the address is not this machine's.
    """
    try:
        kind = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(kind[0], kind[1])
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # finds clients whose machine is gone
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, min(int(1e3 * stalled) + 1, 1 << 30))
        listening.bind(kind[4])
        listening.listen(2048)  # clients that come while models load wait
    except OSError as e:
        raise UserError(f"cannot listen at {host}:{port} ({cause_of(e)}), expected a free --port") from None
    return listening
