"""Completions that try to run code, to take all time or all memory, or to score without an answer."""

import json
from itertools import pairwise
from pathlib import Path

MEBI = 1 << 20
LONG = 1 << 16
HUGE = 999_999_999_999


def payloads(canary: Path) -> dict[str, str]:
    """By name; code among them would make the file `canary`, or start a process with its name in the command line."""
    return {
        **_code(canary),
        **_towers(),
        **_nests(),
        **_long(),
        **_odd_characters(),
        **_odd_numbers(),
        **_bombs(),
        **_moves(),
    }


def _code(canary: Path) -> dict[str, str]:
    """Code in the formats that scorers read, most of which work where `eval` or sympy's parser is given them."""
    call = f"__import__('os').system('touch {canary}')"
    return {
        "call": call,
        "call in an answer": f"<answer>{call}</answer>",
        "call in a box": f"\\boxed{{{call}}}",
        "call in dollars": f"${call}$",
        "call as LaTeX text": f"$\\text{{{call}}}$",
        "call after the marker": f"#### {call}",
        "call as a list": f"[{call}]",
        "call as a matrix": f"[[0, {call}], [1, 0]]",
        "call as a board": f"[['_', 'Q'], ['Q', {call}]]",
        "call as characters": f"['A', 'B', str({call})]",
        "call in a sum": f"3 * 8 + {call}",
        "call in a condition": f"24 if {call} else 24",
        "call in a subscript": f"(24, {call})[0]",
        "call in a polynomial": f"x**2 + Symbol(str({call}))",
        "call in a default": f"(lambda x={call}: 24)()",
        "call in a comprehension": f"[{call} for _ in [0]]",
        "call in an f-string": f'f"{{{call}}}"',
        "call in a walrus": f"(x := {call})",
        "call in JSON": f'{{"a": {call}}}',
        "call through builtins": f"__builtins__['__import__']('os').system('touch {canary}')",
        "call through exec": f'exec("import os; os.system(\\"touch {canary}\\")")',
        "call through compile": f"eval(compile({call!r}, '', 'eval'))",
        "call through sympy": f"sympify({call!r})",
        "open": f"open('{canary}', 'w').write('x')",
        "path": f"__import__('pathlib').Path('{canary}').touch()",
        "process": f"__import__('subprocess').Popen(['sh', '-c', 'sleep 600; : {canary}'])",
        "fork": f"__import__('os').fork() or __import__('os').execlp('sh', 'sh', '-c', 'sleep 600; : {canary}')",
        "dunder tuple": "().__class__.__base__.__subclasses__()",
        "dunder walk": "''.__class__.__mro__[1].__subclasses__()[40]('/etc/passwd').read()",
        "dunder number": "(1).__class__.__init__.__globals__",
        "getattr": f"getattr(__import__('os'), 'sys' + 'tem')('touch {canary}')",
        "format string": "{0.__class__.__init__.__globals__}{answer.__class__.__mro__}",
        "percent format": "%s%n%x%d%(answer)s" * 1000,
        "exit": "exit()",
        "quit the process": "__import__('os')._exit(0)",
        "endless loop": "[0 for _ in iter(int, 1)]",
        "pickle": f"cos\nsystem\n(S'touch {canary}'\ntR.",
        "YAML object": f"!!python/object/apply:os.system ['touch {canary}']",
        "shell": f"$(touch {canary}); `touch {canary}` | touch {canary}",
        "TeX shell": f"\\immediate\\write18{{touch {canary}}} \\input{{/etc/passwd}}",
        "template": f"{{{{ cycler.__init__.__globals__.os.system('touch {canary}') }}}}",
    }


def _towers() -> dict[str, str]:
    """Small texts for numbers that no machine holds."""
    return {
        "power tower": "9**9**9**9",
        "power tower in a box": r"\boxed{9^{9^{9^{9}}}}",
        "power tower in carets": "The answer is 9^9^9^9.",
        "factorials": r"\boxed{((9!)!)!}",
        "binomial": r"$\binom{1000000000}{500000000}$",
        "remainder of a tower": r"$10^{10^{10}} \mod 7$",
        "tangent of a tower": r"$\tan(10^{10^{10}})$",
        "polynomial to a power": r"$(x+y+z)^{300}$",
        "matrix to a power": r"$\begin{pmatrix}1&1\\1&0\end{pmatrix}^{1000000000}$",
        "repeated string": "'a' * 9999999999",
        "range": "list(range(10**12))",
    }


def _nests() -> dict[str, str]:
    """Depth for recursive parsers."""
    return {
        "opening parentheses": "(" * MEBI,
        "closing parentheses": ")" * LONG,
        "balanced parentheses": "(" * (MEBI // 2) + "1" + ")" * (MEBI // 2),
        "parentheses in dollars": "$" + "(" * 1500 + "1" + ")" * 1500 + "$",
        "brackets": "[" * MEBI,
        "balanced brackets": "[" * 5000 + "1" + "]" * 5000,
        "braces": "{" * LONG,
        "JSON objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
        "minus signs": "-" * LONG + "1",
        "nots": "not " * 20_000 + "1",
        "boxes": r"\boxed{" * 100_000,
        "fractions": "$" + r"\frac{1}{" * 20_000 + "1" + "}" * 20_000 + "$",
        "short fractions": "$" + r"\frac{1}{" * 100 + "1" + "}" * 100 + "$",
        "roots": "$" + r"\sqrt{" * 300 + "1" + "}" * 300 + "$",
        "left and right": r"\left(" * 10_000 + r"\right)" * 10_000,
        "negations": "¬" * 20_000 + "A",
        "indented code": "".join(" " * depth + "if 1:\n" for depth in range(500)),
    }


def _long() -> dict[str, str]:
    """Width for what is not linear."""
    return {
        "backslashes": "\\" * MEBI,
        "spaces": " " * LONG,
        "newlines": "\n" * LONG,
        "dollars": "$ " * (LONG // 2),
        "percents": "1 " + "%" * LONG,
        "answers": "answer: " * 10_000,
        "final answers": "The final answer is " * 5_000,
        "opened answers": "<answer>" * 10_000,
        "thoughts": "<think>" * 10_000 + "</think>" * 10_000,
        "alternatives": "a" * 50_000 + "!",
        "commas": "1," * (LONG // 2),
        "thousands": "1,000" * 20_000,
        "sum": "1+" * (LONG // 2) + "1",
        "set": "$\\{" + "1," * 1000 + "1\\}$",
        "table": "\n".join("1 0 " * 64 for _ in range(4096)),
        "symbols in turn": "a∨b∧" * 10_000,
        "variables": "∨".join(f"v{number}" for number in range(5000)),
        "markers": "####" * 20_000,
    }


def _odd_characters() -> dict[str, str]:
    return {
        "Arabic digits": "٤٢",
        "full-width digits": "４２",
        "superscript digits": "⁴²",
        "circled digits": "㊷",
        "mathematical digits": "𝟒𝟐",
        "combining marks": "4" + "\u0301" * 100_000 + "2",
        "right to left": "\u202e24\u202c",
        "zero width": "4\u200b2",
        "null bytes": "\x00" * 1000 + "42\x00",
        "control characters": "".join(map(chr, range(32))) + "42",
        "lone surrogates": "\ud800\udfff42\udc00",
        "byte order mark": "\ufeff42",
        "emoji": "👩‍👩‍👧‍👦" * 1000,
        "nothing": "",
    }


def _odd_numbers() -> dict[str, str]:
    return {
        "NaN": "nan",
        "NaN in a box": r"\boxed{NaN}",
        "NaNs in JSON": "[NaN, NaN, NaN, NaN, NaN]",
        "complex NaN": "nan+nanj",
        "infinity": "inf",
        "minus infinity": "-Infinity",
        "infinities in JSON": "[Infinity, -Infinity]",
        "LaTeX infinity": r"\boxed{\infty}",
        "huge exponent": "1e999999999",
        "tiny exponent": "1e-999999999",
        "huge exponent in JSON": "[1e999999999]",
        "long number": "9" * MEBI,
        "long decimal": "0." + "0" * LONG + "1",
        "long hexadecimal": "0x" + "f" * LONG,
        "zero division": "24/0",
        "zero by zero": r"\boxed{\frac{0}{0}}",
        "underscores": "4_2",
        "true": "True",
        "none": "None",
    }


def _bombs() -> dict[str, str]:
    """Small texts that grow when they are expanded."""
    letters = "abcdefghij"
    doubled = "".join(rf"\def\{b}{{\{a}\{a}}}" for a, b in pairwise(letters))
    entities = "".join(f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in pairwise(letters))
    anchors = "".join(f"{b}: &{b} [{f'*{a},' * 9}*{a}]\n" for a, b in pairwise(letters))
    return {
        "LaTeX macros": rf"\def\a{{9}}{doubled}$\j$",
        "LaTeX macro that calls itself": r"\def\a{\a\a}\a \newcommand{\b}{\b\b}\boxed{\b}",
        "XML entities": f'<!DOCTYPE a [<!ENTITY a "9">{entities}]><answer>&j;</answer>',
        "YAML anchors": f"a: &a 9\n{anchors}",
        "matrix of huge size": r"$\begin{bmatrix}" + "&".join("9" * 500) + r"\end{bmatrix}^{9^{9}}$",
        "matrix that declares its size": f"Shape: {HUGE}x{HUGE}\n1",
        "array header": f"# {HUGE} {HUGE} float64\n1 0",
        "regular expression": r"(a+)+$ (.*)*x ([a-z]+)*!" + "a" * 5000,
    }


def _moves() -> dict[str, str]:
    """Answers to puzzles, with numbers that drive a loop."""
    return {
        "move of many steps": f"A+{HUGE} B-{HUGE}",
        "repeated turn": f"R{HUGE} U{HUGE}",
        "peg that does not exist": f"Move disk 1 from Peg {HUGE} to Peg 2",
        "many moves": "Move disk 1 from Peg 1 to Peg 2\nMove disk 1 from Peg 2 to Peg 1\n" * 5000,
        "many pours": json.dumps(["fill A", "pour A->B", "empty A"] * 5000),
        "many steps": "up down left right " * 5_000,
        "many buttons": "C" * LONG,
        "box far away": json.dumps([{f"Agent[{HUGE}.5, 0.5]": f"move(box_red, square[{HUGE}.5, 0.5])"}] * 1000),
        "open move": json.dumps([{"Agent[0.5, 0.5]": "move(" + ", " * 7000}]),
        "letters": ",".join(f"{letter}={HUGE}" for letter in "ABCDEFGHIJ"),
        "long time": f"{HUGE} days, {HUGE}:{HUGE}:{HUGE}",
        "primes": "×".join(["9" * 4000] * 4),
        "colors": json.dumps({str(vertex): HUGE for vertex in range(10_000)}),
    }
