"""The documents say what the code does, and point to what is there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from torchdistill_adv.cli import make_parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def test_methods_page_is_what_the_classes_say():
    subprocess.run([sys.executable, ROOT / "docs" / "methods.py", "--check"], check=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = page.read_text()
    anchors = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)", text, re.M)
    }
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif "://" not in link:
            assert (page.parent / link.split("#")[0]).exists(), link


def test_commands_are_taken_by_the_parser():
    """A command that is shown in a code block has the arguments that its parser takes."""
    blocks = [block for page in PAGES for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.M | re.S)]
    lines = [
        re.split(r"(?:torchdistill-adv|-m torchdistill_adv) ", line) for block in blocks for line in block.split("\n")
    ]
    commands = [shlex.split(line[1], comments=True) for line in lines if len(line) > 1]
    assert {command[0] for command in commands} >= {"train", "evaluate", "add", "check", "list", "report"}
    for command in commands:
        make_parser().parse_args(command)  # exits where it does not
