"""README and docs: snippets run, commands parse, links lead somewhere, tables are up to date."""

import ast
import builtins
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from parameternet import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHER_RUNS = ("parameternet.yolo", "ultralytics", "transformers", "peft", "gradio", "parameternet.app")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page, language):
    return [body for found, body in FENCE.findall(page.read_text()) if found == language]


def named(pages, language):
    return [page for page in pages if blocks(page, language)]


SNIPPETS = [
    pytest.param(body, id=f"{page.name}-{number}")
    for page in PAGES
    for number, body in enumerate(blocks(page, "python"))
]


@pytest.mark.parametrize("body", SNIPPETS)
def test_each_snippet_runs_on_its_own(body, monkeypatch):
    """Readers copy one. Those that need other environments run in tests/yolo, tests/clients and tests/app."""
    assert not undefined(body)
    if "parameternet_" in body or "dynamic_" in body:
        assert re.search(r"^(import|from) parameternet|torch\.hub", body, re.MULTILINE), "registers the networks"
    monkeypatch.chdir(ROOT)
    if not any(word in body for word in OTHER_RUNS):
        exec(compile(body.replace("path/to/parameternet", str(ROOT)), "snippet", "exec"), {})


def undefined(body):
    """Return names that a snippet reads but nowhere defines."""
    nodes = list(ast.walk(ast.parse(body)))
    imported = {
        (alias.asname or alias.name).partition(".")[0]
        for node in nodes
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    defined = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    arguments = {node.arg for node in nodes if isinstance(node, ast.arg)}
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return read - imported - defined - arguments - stored - set(dir(builtins))


@pytest.mark.parametrize("page", named(PAGES, "bash"), ids=lambda page: page.name)
def test_commands_parse(page):
    for body in blocks(page, "bash"):
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["parameternet"] and len(words) > 1:
                parse(words[1:])


def parse(words):
    context = click.Context(cli.main, info_name="parameternet")
    try:
        name, command, rest = cli.main.resolve_command(context, words)
        command.make_context(name, rest, parent=context)
    except click.exceptions.Exit:
        pass  # --help and the like
    except click.BadParameter as error:
        assert "does not exist" in str(error), f"{words}: {error}"  # data that the reader brings


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_files_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://|mailto:)([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        found = (page.parent / path) if path else page
        assert found.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(found), f"{page.name}: {target}; there are {anchors(found)}"


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings]


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"^ +- (?:.*: )?(\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == [page.name for page in PAGES[1:]]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 140


def test_tables_are_what_the_program_prints():
    command = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr[-2000:]}run python benchmarks/tables.py --write"


@pytest.mark.parametrize(("name", "words"), [("demo", "parameternet predict"), ("test", "/pytest -n auto tests/yolo")])
def test_ci_finds_the_commands_of_the_readme(name, words):
    script = (ROOT / ".ci" / "run").read_text()
    assert f"command_of {name}" in script
    [command] = re.findall(rf"<!-- ci: {name} -->\n```bash\n(.*)\n```", (ROOT / "README.md").read_text())
    assert command.startswith("python3 -m venv .venv") and words in command
