"""Run decode steps from CUDA graphs: one graph for each number of rows and Options.

A step of a small model launches a hundred kernels that each run for microseconds, so the host limits it. Its graph is
recorded after a few called steps, and replayed from then on. All graphs share one memory pool, because a step reads
nothing of an earlier step's memory but the tensors of Rows. Random numbers are not drawn inside: Rows.draw copies them
to the device before the step.
"""

from __future__ import annotations

import contextlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastgpt.core.backend import checks_values
from fastgpt.core.errors import UserError
from fastgpt.core.fallback import report_once
from fastgpt.core.graphs import WARM_STEPS, CaptureLost, record, sentence
from fastgpt.inference.sampling import Choice
from fastgpt.models.gpt import GPT

MOST = 64  # graphs; the one that was not used for longest is dropped


class DecodeGraphs:
    """Caller of decode steps, which replays those that are recorded; if not enabled, it only calls them.

    If a step cannot be recorded, the reason is logged once, and every step is called from then on.
    """

    def __init__(self, model: GPT, like: Tensor, enabled: bool = True) -> None:
        """Enable graphs for a model on a GPU, unless its steps must wait for the device.

        Args:
            like: a tensor on the model's device.
        """
        dynamic = (model.config.rope_scaling or {}).get("rope_type") == "dynamic"  # reads positions on the host
        self.enabled = enabled and like.device.type == "cuda" and not dynamic and not checks_values(like)
        self.model = model
        self.recorded: OrderedDict[Hashable, tuple[Callable[[], None], Choice]] = OrderedDict()
        self.calls = Counter[Hashable]()
        self.held: list[Tensor] = []  # the weights and tables that the graphs read, so their memory is not reused
        self.pool: Any = None
        self.stream: Any = None

    def __call__(self, key: Hashable, step: Callable[[], Choice]) -> Choice:
        """Return step(), called or replayed. The result is valid until the next step.

        Raises:
            UserError: CUDA aborted a capture, so this process cannot continue.
        """
        if not self.enabled:
            return step()
        if self.held and self.held[0].data_ptr() != next(self.model.parameters()).data_ptr():
            self._forget()  # the model was moved or cast
        if key not in self.recorded:
            with self._aside():
                if self.calls[key] < WARM_STEPS or not self._record(key, step):
                    self.calls[key] += 1
                    return step()
        self.recorded.move_to_end(key)
        replay, choice = self.recorded[key]
        replay()
        return choice

    def _record(self, key: Hashable, step: Callable[[], Choice]) -> bool:
        """Record a step; return whether that worked."""
        if not self.held:
            self.held = [t.detach() for t in (*self.model.parameters(), *self.model.buffers())]
        try:
            replay, choice, self.pool = record(step, [], self.pool)
        except CaptureLost as e:
            raise UserError(
                f"generate: a step cannot be recorded in a CUDA graph ({e}), and CUDA does not recover from that: run "
                "again with --no-graphs, or Generator(graphs=False)"
            ) from e
        except Exception as e:
            self.enabled = False
            why = f"a step could not be recorded, so its kernels are launched one by one ({sentence(e)})"
            report_once("generate", why)
            return False
        self.recorded[key] = replay, choice
        if len(self.recorded) > MOST:
            self.calls.pop(self.recorded.popitem(last=False)[0], None)
        return True

    def drop(self, part: Hashable) -> None:
        """Drop the graphs with `part` in their key, a tuple, and the memory that it keeps."""
        for table in (self.recorded, self.calls):
            for key in [key for key in table if isinstance(key, tuple) and part is not None and part in key]:
                del table[key]

    def _forget(self) -> None:
        self.recorded.clear()
        self.calls.clear()
        self.held, self.pool = [], None

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Run on a stream of these graphs, in order with the current one: the default stream cannot be captured."""
        device = next(self.model.parameters()).device
        if device.type != "cuda":  # tests replace `record`
            yield
            return
        current = torch.cuda.current_stream(device)
        self.stream = self.stream or torch.cuda.Stream(device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)
