"""The map from paper to code to test: tests/PAPER.md names only what exists, and no row is without an answer."""

import ast
import functools
import re
from pathlib import Path

import pytest

from model import ANCHORS, darknet_cfg

ROOT = Path(__file__).resolve().parent.parent
HEADER = ["statement", "code", "test"]


def read_rows(text):
    """The rows of the Markdown tables in text, without heads -> (line number, heading above the table, cells)."""
    rows, heading = [], ""
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.lstrip().startswith("|"):
            # the last one follows the closing |
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:]]
            if cells[:3] != HEADER and not set(line) <= set("|-: "):
                rows.append((number, heading, cells))
    return rows


@functools.cache
def names_in(file):
    """The functions, classes, methods (Class.method) and globals that a source file defines."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return names


def missing_names(cell):
    """Checks every `file.py::name` of a cell -> the names, and a sentence for each that is
    malformed or does not exist."""
    found, problems = [], []
    for quoted in re.findall(r"`([^`]*(?:\.py\b|::)[^`]*)`", cell):
        file, separator, name = quoted.partition("::")
        if " " in quoted:  # a command
            continue
        if not (ROOT / file).is_file():
            problems.append(f"there is no file {file}")
        elif separator and name not in names_in(ROOT / file):
            problems.append(f"{file} defines no {name}")
        elif separator:
            found.append(quoted)
    return found, problems


def problems_of(cells):
    """A sentence for everything that is wrong with a row."""
    if len(cells) != 4 or cells[3] or not all(cells[:3]):
        return [f"expected three cells with text, found {cells}"]
    code, problems = missing_names(cells[1])
    tests, more = missing_names(cells[2])
    problems += more + [
        f"{name} is not a test" for name in tests if not re.match(r"tests/test_\w+\.py::test_\w+$", name)
    ]
    if problems:
        return problems
    if not code:
        problems.append("the code cell must name a file and a function")
    if not tests and not re.search(r"\bnot shown\b|\bours differs: \w", cells[2]):
        problems.append('the test cell must name a test, or say "not shown" or "ours differs: why"')
    return problems


def test_every_row_names_code_and_tests_that_exist():
    rows = read_rows((ROOT / "tests" / "PAPER.md").read_text(encoding="utf-8"))
    assert len(rows) > 100
    problems = [f"PAPER.md, line {number}: {problem}" for number, _, cells in rows for problem in problems_of(cells)]
    assert not problems, "\n".join(problems)


GOOD_CODE, GOOD_TEST = "`utils.py::box_iou`", "`tests/test_loss.py::test_gradient_equals_darknets`"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (f"| a | {GOOD_CODE} `loss.py::YoloLoss.forward` `train.py::EPOCHS` | {GOOD_TEST} |", ""),
        (f"| a \\| b | {GOOD_CODE} | not shown: needs VOC |", ""),
        (f"| a | {GOOD_CODE} | ours differs: faster |", ""),
        (f"|  | {GOOD_CODE} | {GOOD_TEST} |", "three cells"),
        (f"| a | {GOOD_CODE} |  |", "three cells"),
        (f"| a | {GOOD_CODE} |", "three cells"),
        (f"| a | b | {GOOD_CODE} | {GOOD_TEST} |", "three cells"),
        (f"| a | `util.py::box_iou` | {GOOD_TEST} |", "no file util.py"),
        (f"| a | `utils.py::box_io` | {GOOD_TEST} |", "utils.py defines no box_io"),
        (f"| a | `loss.py::YoloLoss.backward` | {GOOD_TEST} |", "loss.py defines no YoloLoss.backward"),
        (f"| a | `utils::box_iou` | {GOOD_TEST} |", "no file utils"),
        (f"| a | utils | {GOOD_TEST} |", "the code cell"),
        (f"| a | {GOOD_CODE} | `tests/test_loss.py::test_nothing` |", "defines no test_nothing"),
        (f"| a | {GOOD_CODE} | `tests/test_loss.py::region_loss` |", "is not a test"),
        (f"| a | {GOOD_CODE} | `tests/test_loss.py` |", "the test cell"),
        (f"| a | {GOOD_CODE} | clear from the code |", "the test cell"),
        (f"| a | {GOOD_CODE} | ours differs |", "the test cell"),
    ],
)
def test_a_wrong_row_is_reported(row, problem):
    ((number, heading, cells),) = read_rows("## Head\n\n| statement | code | test |\n|---|---|---|\n" + row)
    assert (number, heading) == (5, "Head")
    found = problems_of(cells)
    assert (len(found) == 1 and problem in found[0]) if problem else not found


def test_the_exported_cfg_has_a_row_per_line_and_the_values_of_the_rows():
    rows = read_rows((ROOT / "tests" / "PAPER.md").read_text(encoding="utf-8"))
    stated, differs = {}, set()
    for _, heading, (statement, _, test, _) in rows:
        if heading == "yolov2-voc.cfg":
            section, key, value = re.match(r"`(\[\w+\]) (\w+)=([^`]*)`", statement).groups()
            stated.setdefault((section, key), set()).add(value)
            if "ours differs" in test:
                differs.add((section, key))
    exported = {}
    for part in darknet_cfg(20, ANCHORS, 416).split("\n\n"):
        section, *lines = part.strip().split("\n")
        for line in lines:
            key, _, value = line.partition("=")
            exported.setdefault((section, key), set()).add(value)
    assert set(exported) == set(stated)
    for place, values in exported.items():
        if place[0] != "[convolutional]" and place not in differs:  # convolutions have more values than their rows name
            assert values == stated[place], place
