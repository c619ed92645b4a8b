"""The tag `{% generation %}` of chat templates, which transformers added to mark what the model says."""

from __future__ import annotations

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

BEGIN, END = "\ufdd0", "\ufdd1"  # no characters of any text


class GenerationTag(Extension):
    """Puts BEGIN and END around the text of each block."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (BEGIN, END))
        return nodes.Scope([begin, *body, end]).set_lineno(line)
