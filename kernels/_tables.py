"""Small tables of numbers on a device (addresses, sizes, hyperparameters), uploaded once per content.

Uploads are asynchronous, from pinned memory. Pinned memory cannot be allocated during the capture of a CUDA graph, so
a table that is first seen then uses a pair of buffers that an earlier upload of the same shape set aside. The copy
becomes a node of the graph and runs at each replay, so the pair belongs to that graph from then on.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

ENTRIES = 64  # the oldest is dropped; its memory is reused only after the kernels that read it have run
SPARES = 4  # pairs of buffers for each shape, for captures

Built = tuple[Tensor, Any]  # a table, and any note to keep with it


class Tables:
    """The cached tables of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # key -> (table, note), stream and event of its upload
        self.entries: OrderedDict[Hashable, tuple[Built, Any, Any]] = OrderedDict()
        self.spares: dict[Hashable, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self.captured: list[Any] = []  # read or written by graphs, so never freed

    def get(self, key: Hashable, build: Callable[[], Built], moves: bool = False) -> Built:
        """Return the table of this key on the device, and its note; build and upload it if it is new.

        moves: whether the table may change between warm-up and capture, so that spare buffers are set aside.
        """
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if key in self.entries:
            built, stream, event = self.entries[key]
            if event is not None and not capturing:  # a capture starts after a synchronisation, so it need not wait
                current = torch.cuda.current_stream(self.device)
                if stream != current:
                    current.wait_event(event)
            if capturing:
                self.captured.append(built)
            return built
        host, note = build()
        if capturing:
            return self._upload_captured(host), note
        while len(self.entries) >= ENTRIES:
            self.entries.popitem(last=False)
        self.entries[key] = self._upload(host, note, moves)
        return self.entries[key][0]

    def _upload(self, host: Tensor, note: Any, moves: bool) -> tuple[Built, Any, Any]:
        if self.device.type == "cpu":
            return (host, note), None, None
        table = host.pin_memory().to(self.device, non_blocking=True)
        stream = torch.cuda.current_stream(self.device)
        spares = self.spares[host.shape, host.dtype]
        while moves and len(spares) < SPARES:
            spares.append((torch.empty_like(host, pin_memory=True), torch.empty_like(table)))
        return (table, note), stream, stream.record_event()

    def _upload_captured(self, host: Tensor) -> Tensor:
        spares = self.spares[host.shape, host.dtype]
        if not spares:
            raise RuntimeError(
                "adamw: this set of tensors was never seen before the capture of a CUDA graph, expected at least one "
                "step outside of a capture for every set (and for every further graph over moved gradients)"
            )
        pinned, table = spares.pop()
        self.captured.append((pinned, table))
        pinned.copy_(host)
        return table.copy_(pinned, non_blocking=True)
