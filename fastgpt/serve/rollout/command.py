"""`fastgpt deploy`: which version of a model is served, decided by a gate, and one command to go back."""

from __future__ import annotations

import json
from pathlib import Path

from fastgpt.core.command import Parser, number, run_group
from fastgpt.core.errors import UserError, counted
from fastgpt.serve.rollout.state import Version, read

HERE = "fastgpt.serve.rollout.command"
SUBCOMMANDS = {
    "init": (f"{HERE}:init", "begin a deployment with a model, which is served"),
    "propose": (f"{HERE}:propose", "add a version, and let a gate compare it with the one that is served"),
    "roll-out": (f"{HERE}:roll_out", "serve a version that the gate let pass"),
    "roll-back": (f"{HERE}:roll_back", "serve the version before"),
    "status": (f"{HERE}:status", "show the versions and the history"),
}


def main(argv: list[str]) -> int:
    """Run `fastgpt deploy`."""
    about = "Roll out versions of a model that `fastgpt serve DIR` serves.\n\ncommands:"
    return run_group("fastgpt deploy", "DIR ...", about, SUBCOMMANDS, argv)


def _parser(name: str) -> Parser:
    about = SUBCOMMANDS[name][1]
    parser = Parser(prog=f"fastgpt deploy {name}", description=f"{about[0].upper()}{about[1:]}.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the deployment")
    if name != "status":
        parser.add_argument("--by", metavar="NAME", help="who does this, for the history (default: the user)")
    return parser


def init(argv: list[str]) -> int:
    """Run `fastgpt deploy init`."""
    from fastgpt.serve.rollout import actions

    parser = _parser("init")
    parser.add_argument("--model", required=True, metavar="RUN", help="run, checkpoint or folder of a model")
    args = parser.parse_args(argv)
    version = actions.init(args.folder, args.model, args.by)
    print(f"{args.folder}: version 1 is {version.source}; `fastgpt serve {args.folder}` serves it")
    return 0


def propose(argv: list[str]) -> int:
    """Run `fastgpt deploy propose`; return 1 if the gate failed."""
    from fastgpt.evaluate.compare import add_bounds
    from fastgpt.evaluate.paired import Options
    from fastgpt.serve.rollout import actions

    parser = _parser("propose")
    parser.add_argument("run", metavar="RUN", help="run, checkpoint or folder of a model")
    parser.add_argument(
        "--gate",
        nargs=2,
        action="append",
        default=[],
        metavar=("BASE", "NEW"),
        help="evaluations of the served version and of RUN: JSON of `fastgpt eval`, or runs; may be given again",
    )
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help="metrics that the gate tests (default: all)")
    add_bounds(parser)
    args = parser.parse_args(argv)
    for name in ("metrics", "alpha", "min_difference"):
        if getattr(args, name) is not None and not args.gate:
            raise UserError(f"--{name.replace('_', '-')} is for --gate, expected --gate BASE NEW")
    options, alpha = Options(tuple(args.metrics or ())), 0.05 if args.alpha is None else args.alpha
    gates = [(base, new) for base, new in args.gate]
    version = actions.propose(args.folder, args.run, gates, options, alpha, args.min_difference or 0.0, args.by)
    print(f"version {version.number}: {verdict_of(version)}")
    for line in version.gate.failed if version.gate else ():
        print(f"FAIL {line}")
    return 1 if version.gate and not version.gate.passed else 0


def roll_out(argv: list[str]) -> int:
    """Run `fastgpt deploy roll-out`."""
    from fastgpt.serve.rollout import actions

    parser = _parser("roll-out")
    parser.add_argument("version", type=number(int, 1), metavar="VERSION", help="number that `propose` printed")
    parser.add_argument("--force", metavar="REASON", help="although no gate let it pass; the history keeps the reason")
    args = parser.parse_args(argv)
    if args.force is not None and not args.force.strip():
        raise UserError("--force is empty, expected the reason")
    version = actions.roll_out(args.folder, args.version, args.force, args.by)
    print(f"version {version.number} is to be served; running servers switch to it when it has loaded")
    return 0


def roll_back(argv: list[str]) -> int:
    """Run `fastgpt deploy roll-back`."""
    from fastgpt.serve.rollout import actions

    parser = _parser("roll-back")
    parser.add_argument("--reason", metavar="TEXT", help="why, for the history")
    args = parser.parse_args(argv)
    version = actions.roll_back(args.folder, args.reason, args.by)
    print(f"version {version.number} is to be served again; running servers switch to it when it has loaded")
    return 0


def status(argv: list[str]) -> int:
    """Run `fastgpt deploy status`."""
    parser = _parser("status")
    parser.add_argument("--json", action="store_true", help="print the state as JSON")
    args = parser.parse_args(argv)
    state = read(args.folder)
    if args.json:
        print(json.dumps(state.plain(), indent=1, ensure_ascii=False))
        return 0
    for version in state.versions.values():
        mark = "*" if version is state.current else " "
        print(f"{mark} {version.number}  {version.fingerprint[:12]}  {verdict_of(version)}  {version.source}")
    print()
    for event in state.history:
        reason = f": {event.reason}" if event.reason else ""
        print(f"{event.time}  {event.by}  {event.action} {event.version}{reason}")
    return 0


def verdict_of(version: Version) -> str:
    """Return what the gate decided, in words."""
    gate = version.gate
    if gate is None:
        return "no gate"
    word = "passed" if gate.passed else "failed"
    return f"gate {word} against version {gate.base}, {len(gate.failed)} of {counted(gate.tests, 'test')} worse"
