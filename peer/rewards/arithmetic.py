"""The value of an arithmetic expression that a stranger wrote: numbers, + - * /, and parentheses, nothing else."""

import ast
from dataclasses import dataclass
from fractions import Fraction

MAX_LENGTH = 256
"""Characters of an expression. Without powers its value has no more digits than that."""
MAX_DEPTH = 32
"""Parentheses within parentheses."""

_ALPHABET = frozenset("0123456789+-*/() \t\n")


@dataclass(frozen=True)
class Expression:
    """What an expression is worth, and the integers that stand in it, in their order."""

    value: Fraction
    numbers: tuple[int, ...]


def evaluate(text: str) -> Expression:
    """Exactly, in fractions. ValueError for anything but such an expression; ZeroDivisionError as the name says.

    The text goes to Python's parser, never to its evaluator, and only after its length, its characters and the depth
    of its parentheses have been looked at; of the tree, no node is accepted but the five operations and integers.
    """
    source = text.strip()
    if len(source) > MAX_LENGTH or not _ALPHABET.issuperset(source) or _depth(source) > MAX_DEPTH:
        raise ValueError("not an arithmetic expression")
    try:
        tree = ast.parse(source.replace("\n", " "), mode="eval").body
    except SyntaxError as error:
        raise ValueError("not an arithmetic expression") from error
    numbers: list[int] = []
    return Expression(_value(tree, numbers), tuple(numbers))


def _depth(source: str) -> int:
    depth = deepest = 0
    for character in source:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    return deepest


def _value(node: ast.expr, numbers: list[int]) -> Fraction:
    match node:
        case ast.Constant(value=int() as number):
            numbers.append(number)
            return Fraction(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, numbers)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand, numbers)
        case ast.BinOp(left=left, op=operation, right=right):
            return _apply(operation, _value(left, numbers), _value(right, numbers))
    raise ValueError(f"{type(node).__name__} in an arithmetic expression")


def _apply(operation: ast.operator, left: Fraction, right: Fraction) -> Fraction:
    match operation:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
    raise ValueError(f"{type(operation).__name__} in an arithmetic expression")
