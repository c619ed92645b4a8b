"""Turn tokens into text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Decoder of one text, which ends before the first stop string.

    A text is a sequence of bytes, and a token may end within a character. `push` returns what is certain: complete
    UTF-8 characters that cannot be the beginning of a stop string. Bytes that form no character become U+FFFD, as in
    `bytes.decode(errors="replace")`. The pieces together are `text`.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._stop = [s.encode() for s in stop]
        self._held = b""  # not decoded yet: a suffix of it may be the beginning of a stop string
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: bytes) -> str:
        """Append the bytes of a token; return the text that they complete. `stopped` tells that a stop string came."""
        self._held += token
        found = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            self._held = self._held[: min(found)]
            return self.end()
        certain = len(self._held) - self._begun()
        out, self._held = self._decoder.decode(self._held[:certain]), self._held[certain:]
        self.text += out
        return out

    def end(self) -> str:
        """End the text; return what was held back."""
        out = self._decoder.decode(self._held, final=True)
        self._held = b""
        self.text += out
        return out

    def _begun(self) -> int:
        """Return the length of the longest end of the held bytes that begins a stop string."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        for n in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-n:]) for s in self._stop):
                return n
        return 0
