"""Generate text from a trained model."""

from fastgpt.inference.generate import generate
from fastgpt.inference.generator import Generator
from fastgpt.inference.grammar import Grammar
from fastgpt.inference.requests import Piece, Request, Result
from fastgpt.inference.weights import convert_weights

__all__ = ["Generator", "Grammar", "Piece", "Request", "Result", "convert_weights", "generate"]
