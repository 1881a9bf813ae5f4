"""The code of the README runs, and imports run one way."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet_runs(number):
    exec(compile(SNIPPETS[number], f"README.md snippet {number}", "exec"), {"__name__": "readme"})


def test_readme_has_an_nnx_and_a_linen_example():
    assert sum("nnx.Module" in s for s in SNIPPETS) == 1
    assert sum("nn.Module)" in s and "nnx.bridge" in s for s in SNIPPETS) == 1


def test_commands_of_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    for module in set(re.findall(r"python -m (\S+?)[\s`]", text)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


# Each folder may import the ones to its right.
ORDER = ["experiments", "mhc_jax", "kernels_pallas"]


@pytest.mark.parametrize("folder", ORDER)
def test_imports_run_one_way(folder):
    forbidden = set(ORDER[: ORDER.index(folder)]) | {"configs", "tests"} - {folder}
    if folder == "experiments":
        forbidden = {"tests"}
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for name in names:
                assert name.split(".")[0] not in forbidden, f"{path} imports {name}"
