"""The code of README and docs runs, what they name exists, and imports run one way."""

import ast
import operator
import pathlib
import re

import pytest

from configs import default

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "experiments").rglob("*.md")),
]
SNIPPETS = {
    str(page.relative_to(ROOT)): found
    for page in PAGES
    if (found := re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
}


@pytest.mark.parametrize("page", sorted(SNIPPETS))
def test_snippets_run(page, tmp_path, monkeypatch):
    """In order and in one namespace, as a reader would, in a folder of their own: some write files."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    for number, code in enumerate(SNIPPETS[page]):
        exec(compile(code, f"{page} snippet {number}", "exec"), names)


def test_what_commands_write_is_ignored_by_git():
    """Each --output and --figure of the docs, and each default of a command, is in .gitignore."""
    ignored = (ROOT / ".gitignore").read_text().split("\n")
    paths = {
        path
        for page in PAGES
        for path in re.findall(r"--(?:output|figure)[= ]([a-z0-9_./]+)", page.read_text())
    }
    source = "\n".join(path.read_text() for path in (ROOT / "experiments").rglob("*.py"))
    types = r"type=cli\.new_\w+,\s+default=(?:pathlib\.Path\()?"
    paths |= set(re.findall(types + r'"([^"]+)"', source))
    paths |= set(re.findall(r'add_study_arguments\(\w+, "([^"]+)"', source))
    assert {"runs/figures", "runs/report.html", "runs/stability", "runs/sinkhorn"} <= paths
    seen = {
        path
        for path in paths
        if not path.startswith("/")
        and not {f"/{path}", f"/{path}/", f"/{path.partition('/')[0]}/"} & {*ignored}
    }
    assert not seen, "git would show these"


def test_readme_has_an_nnx_and_a_linen_example():
    code = SNIPPETS["README.md"]
    assert sum("nnx.Module" in s for s in code) == 1
    assert sum("(nn.Module)" in s and "nnx.bridge" in s for s in code) == 1


def test_readme_fits_a_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page):
    """Modules of commands, fields of configs, files of links."""
    text = page.read_text()
    for module in set(re.findall(r"python -m ((?:experiments|mhc_jax)\S*?)[\s`]", text)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    fields = default.get_config()
    for name in set(re.findall(r"--config\.([a-z_0-9.]+)=", text)):
        assert operator.attrgetter(name.removeprefix("config."))(fields) is not Ellipsis, name
    for config in set(re.findall(r"--config=(configs/\w+\.py)", text)):
        assert (ROOT / config).exists(), config
    for target in re.findall(r"\]\((?!http)([^)#]*)", text):
        assert not target or (page.parent / target).exists(), target


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
