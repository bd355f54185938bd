"""Who may import whom, and what may not be called at all."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cli", "coordinator", "peer", "protocol")
PRODUCT = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TREE = sorted({*PRODUCT, *(ROOT / "tests").rglob("*.py"), *(ROOT / "examples").rglob("*.py")})
P2P = ROOT / "protocol" / "transport" / "p2p.py"
LIGHT = ROOT / "protocol" / "transport" / "light.py"

FORBIDDEN = {
    "peer": ("hivegrpo.coordinator", "hivegrpo.cli"),
    "coordinator": ("hivegrpo.peer", "hivegrpo.cli"),
    "protocol": ("hivegrpo.peer", "hivegrpo.coordinator", "hivegrpo.cli"),
    "cli": (),
}
BANNED_MODULES = ("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
BANNED_CALLS = ("eval", "exec", "torch.load")


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that a file imports, and every name that it imports from one, dotted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def dangers(tree: ast.AST) -> Iterator[str]:
    """Ways to run code that came as data."""
    for name in imports(tree):
        yield from (module for module in (*BANNED_MODULES, "torch.load") if within(name, module))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from (name for name in BANNED_CALLS if ast.unparse(node.func) == name)
            yield from (f"{keyword.arg}=" for keyword in node.keywords if _trusts(keyword))


def _trusts(keyword: ast.keyword) -> bool:
    trusting = {"trust_remote_code": False, "allow_pickle": False, "weights_only": True}
    harmless = trusting.get(keyword.arg or "")
    return harmless is not None and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is harmless)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_packages_import_only_what_they_may(path: Path) -> None:
    forbidden = FORBIDDEN[path.relative_to(ROOT).parts[0]]
    assert [name for name in imports(parse(path)) if any(within(name, package) for package in forbidden)] == []


@pytest.mark.parametrize("path", TREE, ids=name_of)
def test_only_the_p2p_transport_imports_hivemind(path: Path) -> None:
    if path in (P2P, ROOT / "tests" / "test_p2p.py"):  # that test is of what it makes of hivemind's parts
        return
    assert [name for name in imports(parse(path)) if within(name, "hivemind")] == []


@pytest.mark.parametrize("path", TREE, ids=name_of)
def test_only_the_light_transport_imports_py_libp2p_and_trio(path: Path) -> None:
    if path != LIGHT:
        assert [name for name in imports(parse(path)) if within(name, "libp2p") or within(name, "trio")] == []


@pytest.mark.parametrize("path", [path for path in PRODUCT if path.name == "__init__.py"], ids=name_of)
def test_no_package_imports_the_p2p_transport_for_its_users(path: Path) -> None:
    assert [name for name in imports(parse(path)) if within(name, "hivegrpo.protocol.transport.p2p")] == []


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_nothing_runs_code_that_came_as_data(path: Path) -> None:
    assert list(dangers(parse(path))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "torch.load(path)",
        "eval(text)",
        "exec(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=flag)",
        "numpy.load(path, allow_pickle=True)",
    ],
)
def test_the_search_for_dangers_finds(source: str) -> None:
    assert list(dangers(ast.parse(source))) != []


def test_importing_the_protocol_brings_in_neither_torch_nor_hivemind() -> None:
    modules = [
        ".".join(("hivegrpo", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        for path in sorted((ROOT / "protocol").rglob("*.py"))
        if path not in (P2P, LIGHT)
    ]
    code = (
        f"import importlib, sys\nfor name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'hivemind', 'transformers'} & set(sys.modules)\n"
        "    assert not heavy, f'{name} imports {heavy}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_every_package_folder_is_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {".".join(("hivegrpo", *path.parent.relative_to(ROOT).parts)) for path in PRODUCT}
    assert folders == set(settings["tool"]["setuptools"]["packages"])
