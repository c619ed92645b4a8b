"""Options of `fastgpt serve` for feedback and a shadow. Needs no HTTP library, so that --help needs none either."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fastgpt.core.command import number
from fastgpt.core.errors import UserError
from fastgpt.serve.rollout.state import is_deployment

if TYPE_CHECKING:
    from fastgpt.serve.app import Part
    from fastgpt.serve.engine import Model
    from fastgpt.serve.shadow import Shadow

SHARE = 0.1


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("--feedback", type=Path, metavar="DIR", help="keep thumbs of users, with prompt and answer, in this store")
    add("--shadow", metavar="RUN", help="a model that answers a share of the requests of the first one, unseen")
    add(
        "--shadow-share",
        type=number(float, 0, 1, open_least=True),
        metavar="SHARE",
        help=f"of the requests, 0 to 1 (default: {SHARE})",
    )
    add("--shadow-report", type=Path, metavar="FILE", help="write what GET /v1/shadow shows, as JSON")


def check(args: argparse.Namespace, adapted: Iterable[str]) -> None:
    """Refuse settings that have no effect, and adapters of a model whose weights may change.

    Args:
        adapted: paths of the models that have adapters, or may have some later.

    Raises:
        UserError: there is one.
    """
    for path in adapted:
        if is_deployment(path):
            raise UserError(f"{path} is a deployment, whose weights change, expected a model for adapters")
    for name in ("shadow_share", "shadow_report"):
        if getattr(args, name) is not None and args.shadow is None:
            raise UserError(f"--{name.replace('_', '-')} is for --shadow, expected --shadow RUN")


def feedback_of(args: argparse.Namespace) -> list[Part]:
    """Return the part that keeps feedback, if it is asked for. Raises UserError if the folder cannot be used."""
    if args.feedback is None:
        return []
    from fastgpt.serve.feedback.route import Feedback
    from fastgpt.serve.watch.store import Store

    places = [args.feedback, *filter(None, [getattr(args, "store", None)])]
    store, *others = [Store(place, create=True) for place in places]
    return [Feedback(store, (store, *others)).add]


def shadow_of(args: argparse.Namespace, live: str, engine: Model, queue: int) -> list[Shadow]:
    """Return the shadow of a model, if one is asked for, with an engine as those of the models.

    Raises:
        UserError: it cannot be served.
    """
    if args.shadow is None:
        return []
    from fastgpt.serve.served import serve_model
    from fastgpt.serve.shadow import NICE, Shadow

    candidate = serve_model("shadow", replace(engine, path=args.shadow, nice=NICE), queue)
    share = SHARE if args.shadow_share is None else args.shadow_share
    return [Shadow(candidate, live, share, args.timeout, args.shadow_report)]
