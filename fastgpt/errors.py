"""UserError under its public name: what a wrong setting, file or input raises."""

from fastgpt.core.errors import UserError

__all__ = ["UserError"]
