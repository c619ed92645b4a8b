"""Weights between a folder in Hugging Face's form and fastgpt's names, one parameter at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgpt.core.errors import UserError
from fastgpt.core.tensorfile import DTYPES
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.models.weights.family import Family
from fastgpt.models.weights.files import FileTensor, check_tensors, some
from fastgpt.models.weights.layouts import Layout

# Masks and rotary tables that older files hold, and that a model makes itself
BUFFERS = re.compile(r"\.(attn|attn\.attention|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$|\.embed_positions$")


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model and the tensors of a file that it is made of: names and shapes in the layout's order."""

    name: str
    shape: tuple[int, ...]
    layout: Layout
    files: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


def parameters(family: Family, c: ModelConfig, lm_head: bool = True) -> list[Parameter]:
    """Return the parameters of a model by name, with their tensors in a file of the family; lm_head: with its head."""
    with torch.device("meta"):
        named = GPT(c).named_parameters()
        shapes = {name: tuple(p.shape) for name, p in named if lm_head or not name.startswith("head.")}
    found = []
    for name, shape in sorted(shapes.items()):
        module, _, leaf = name.rpartition(".")
        layer = re.search(r"(?<=blocks\.)\d+", module)
        layout = family.layouts[re.sub(r"(?<=blocks\.)\d+", "{i}", module)]
        files = tuple(f"{m.format(i=layer[0] if layer else '')}.{leaf}" for m in layout.modules)
        found.append(Parameter(name, shape, layout, files, tuple(map(tuple, layout.shapes(shape, c)))))
    return found


class Weights:
    """The tensors of a folder as a model's parameters; opened and checked, but not read yet.

    Attributes:
        dtype: the one that holds every tensor's values: theirs, or where they differ the wider one.
    """

    def __init__(
        self, found: dict[str, FileTensor], family: Family, c: ModelConfig, where: str, lm_head: bool = True
    ) -> None:
        """Raises UserError that lists the tensors that are missing, too many, or of another shape or type.

        lm_head: False for a model with a task head in its place, whose tensors are not in `found`.
        """
        self.config, self.where = c, where
        self.parameters = {p.name: p for p in parameters(family, c, lm_head)}
        self.found = {_full_name(name, family): t for name, t in found.items()}
        expected = {f: shape for p in self.parameters.values() for f, shape in zip(p.files, p.shapes)}
        head = f"{family.layouts['head'].modules[0]}.weight"
        tied = lm_head and c.tied and head in self.found
        check_tensors(self.found, expected | ({head: expected_head(family, c)} if tied else {}), BUFFERS, where)
        dtypes = [DTYPES[self.found[name].dtype] for name in expected]
        self.dtype = dtypes[0]
        for dtype in dtypes[1:]:
            self.dtype = torch.promote_types(self.dtype, dtype)
        if tied:
            table = f"{family.layouts['wte'].modules[0]}.weight"
            if not torch.equal(self.found[head].read(), self.found[table].read()):
                raise UserError(f"{where} has a {head} other than {table}, although its config.json ties them")

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a parameter, by fastgpt's name, in `dtype` (default: `self.dtype`).

        Raises:
            UserError: it has values that are not finite; all tensors of the files that have any are listed.
        """
        p = self.parameters[name]
        parts = [self.found[file].read() for file in p.files]
        if not all(map(finite, parts)):
            bad = [f for p in self.parameters.values() for f in p.files if not finite(self.found[f].read())]
            raise UserError(f"{self.where} has NaN or infinite values in {some(bad)}")
        return p.layout.pack([part.to(self.dtype) for part in parts], self.config).to(dtype or self.dtype).contiguous()


def finite(t: Tensor) -> bool:
    """Return whether all values are finite; unlike torch.isfinite it needs no memory of the size of t."""
    return t.numel() == 0 or all(math.isfinite(float(end)) for end in torch.aminmax(t))


def expected_head(family: Family, c: ModelConfig) -> tuple[int, ...]:
    """Shape in a file of a head that is tied, and therefore need not be there."""
    return tuple(family.layouts["head"].shapes((c.padded_vocab_size, c.width), c)[0])


def _full_name(name: str, family: Family) -> str:
    """Return a tensor's name with the family's prefix, which older files leave out."""
    for old, new in family.rename:
        name = new + name.removeprefix(old) if name.startswith(old) else name
    head = family.layouts["head"].modules[0] + "."
    return name if name.startswith((family.prefix, head)) else family.prefix + name


def exported(name: str, read: Callable[[str], Tensor], dtype: torch.dtype, names: Iterable[str]) -> Tensor:
    """Return a parameter on the CPU in `dtype`.

    Args:
        name: its name. read: returns a parameter by its name.
        names: of all parameters that are exported.

    Raises:
        UserError: values are not finite, which lists the parameters with such values, or not in `dtype`.
    """
    t = read(name).detach().cpu()
    if not finite(t):
        bad = [other for other in names if not finite(read(other).detach())]
        raise UserError(f"export: the weights have NaN or infinite values in {some(bad)}")
    t = t.to(dtype)
    if not finite(t):
        raise UserError(f"export: {name} has values that {dtype} cannot hold".replace("torch.", ""))
    return t


def file_tensors(
    family: Family, c: ModelConfig, read: Callable[[str], Tensor], dtype: torch.dtype, lm_head: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the family's file, one parameter after the other.

    Args:
        read: returns a parameter by fastgpt's name.
        lm_head: with the head.

    Raises:
        UserError: as `exported`.
    """
    found = parameters(family, c, lm_head)
    for p in found:
        t = exported(p.name, read, dtype, [other.name for other in found])
        for file, part in zip(p.files, p.layout.unpack(t, c), strict=True):
            yield file, part.contiguous()
