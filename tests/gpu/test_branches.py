"""The list of places that act differently on a GPU, in docs/how-it-is-built.md, is complete."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "docs/how-it-is-built.md").read_text().split("## GPU")[1].split("\n## ")[0]


def asks_for_device(path: Path) -> bool:
    """Whether code names a device type other than the CPU."""
    tree = ast.parse(path.read_text())
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return bool({"cuda", "mps"} & texts or {"cuda", "is_cuda", "is_mps"} & names)


def test_every_file_with_such_a_branch_is_listed() -> None:
    package = ROOT / "lightning_bn"
    with_branches = {str(p.relative_to(package)) for p in package.rglob("*.py") if asks_for_device(p)}
    listed = set(re.findall(r"`(\w+/\w+\.py)`", TABLE))
    assert with_branches <= listed, with_branches - listed
    assert all((package / name).exists() for name in listed)


def test_every_test_of_the_list_exists() -> None:
    defined = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    named = set(re.findall(r"`(test_\w+)`", TABLE))
    assert named and named <= defined, named - defined
