"""Documents, --help texts, messages and comments use the field's terms (docs/glossary.md), one term for one thing."""

import ast
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "save/README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
#: The product's files: the strings in them that a user reads are checked, help texts and messages.
PRODUCT = ("*.py", "models/*.py", "distiller_zoo/*.py", "crd/*.py", "dataset/*.py", "helper/**/*.py", "scripts/**/*.py")
CODE = sorted({path.relative_to(ROOT).as_posix() for pattern in PRODUCT for path in ROOT.glob(pattern)})
TESTS = sorted(
    path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/**/*.py") if path.name != Path(__file__).name
)
DESCRIBED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
#: A private word or phrase, in the sense meant -> the field's term.
WORDING = {
    r"\bmend(s|ed|ing)?\b": "repair, fix",
    r"\b(go|goes|going|went|gone) on\b": "resumes, continues",
    r"\b(lies?|lying)\b(?! (between|within|above|below|outside))": "is stored, is",
    r"\bstands?\b(?! (for|alone|out)\b|-in)": "is",
    r"\bbeside\b|\bbesides(?=[.,;:)]|$)": "next to; as well",
    r"\bke(ep|eeps|pt) (\w+ )?apart\b": "held out",
    r"\b(published|first|recorded|kept|known|its own) sums?\b(?! of)|\bsum was\b": "checksum",
    r"\b(?<!decimal )(?<!two )(?<!three )places\b": "fields, entries, GPUs",
    r"\b(is|are|was|were|not) over(?=[.,;:)]|$| (and|or|in|already)\b)": "is done, is finished",
    r"\bdisk takes no more\b": "the disk is full",
    r"\bof no use\b": "invalid",
    r"\bflatter(s|ed|ing)?\b": "is optimistically biased",
    r"\bcount(s|ed)? (\w+ )?up\b": "consecutive",
    r"\bso many (?!\w+ (that|as)\b)": "K",
    r"\bas (it|the training) goes\b": "streamed",
    r"\bof all processes together\b": "global",
    r"\b(is|are|be|was|were|must be|been) (re)?stretched\b": "scales with",
    r"\bin K parts\b": "micro-batches",
    r"\bas if it were (done|over)\b": "ends after",
    r"\bhalf[- ](there|written)\b": "partly written",
    r"\btakes? (it|them|its state) up\b|\btakes? up again\b": "restores",
    r"\bmay be said of\b": "conclusions",
}


def offences(text: str) -> list[str]:
    """What of `WORDING` a text holds, each with the term to use instead."""
    flat = " ".join(text.split())
    found = [(match, term) for pattern, term in WORDING.items() for match in re.finditer(pattern, flat, re.I)]
    return [f"{flat[max(match.start() - 25, 0) : match.end() + 25]!r}: {term}" for match, term in found]


def prose(document: str) -> str:
    """A document without code, links' targets and what scripts generate between markers."""
    text = (ROOT / document).read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```$|<!-- (\w+) \S+ -->.*?<!-- end of \1 -->", "", text, flags=re.S | re.M)
    text = re.sub(r"<!-- methods -->.*?<!-- end of methods -->|<!-- \S+\.json -->.*?<!-- end -->", "", text, flags=re.S)
    return re.sub(r"`[^`]*`|\]\([^)]*\)", " ", text)


def messages(path: Path) -> list[str]:
    """The strings of a Python file that a user may read: no docstrings but the module's, which --help shows."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = [node for node in ast.walk(tree) if hasattr(node, "body") and isinstance(node.body, list)]
    described = [node for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    docstrings = {id(node.body[0].value) for node in described if ast.get_docstring(node) is not None}
    if path.relative_to(ROOT).parts[0] != "scripts":
        docstrings |= {id(node.body[0].value) for node in nodes if node is tree and ast.get_docstring(tree)}
    joined = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    parts = {id(part) for node in joined for part in node.values}
    texts = ["".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values) for node in joined]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings | parts:
            texts.append(node.value)
    return texts


def comments(path: Path) -> list[str]:
    """The docstrings of a Python file and its comments, those of lines below each other as one."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, DESCRIBED)]
    texts, last = [ast.get_docstring(node) or "" for node in nodes], None
    with tokenize.open(path) as file:
        found = [each for each in tokenize.generate_tokens(file.readline) if each.type == tokenize.COMMENT]
    for each in found:
        text, begins = each.string.lstrip("#: "), last != each.start[0] - 1
        texts.append(text if begins else f"{texts.pop()} {text}")
        last = each.start[0]
    return texts


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_use_the_fields_words(document):
    assert not offences(prose(document))


@pytest.mark.parametrize("file", CODE)
def test_messages_and_help_use_the_fields_words(file):
    assert not [offence for text in messages(ROOT / file) for offence in offences(text)]


@pytest.mark.parametrize("file", [*CODE, *TESTS])
def test_comments_and_docstrings_use_the_fields_words(file):
    assert not [offence for text in comments(ROOT / file) for offence in offences(text)]


@pytest.mark.parametrize(
    "text",
    [
        "the images can be read; mend them",
        "the run goes on where it was stopped",
        "where that data set lies",
        "the recorded one stands in the table",
        "a JSON file beside it",
        "images that are kept apart",
        "its published sum agrees",
        "the disk takes no more",
        "it flatters",
        "trials are counted up",
    ],
)
def test_private_words_are_noticed(text):
    assert offences(text)


@pytest.mark.parametrize(
    "text",
    [
        "the sum of the losses is trained",
        "the mean is over all images",
        "the value lies within the band",
        "C stands for channels; a page that stands alone",
        "two decimal places",
        "as many images as there are",
        "an amendment of the config",
    ],
)
def test_legitimate_uses_pass(text):
    assert not offences(text)


@pytest.mark.parametrize("file", [*DOCUMENTS, *(file for file in CODE if not file.startswith("models/"))])
def test_a_stage_is_a_part_of_the_training(file):
    """Only in models/ is it a part of a network too, whose outputs are feature maps anywhere else."""
    assert not re.search(
        r"stage\s+outputs?\b|(several|last|many)\s+stages\b", (ROOT / file).read_text(encoding="utf-8")
    )


def test_the_glossary_is_short():
    rows = re.findall(r"^\| (?!term |--)", (ROOT / "docs" / "glossary.md").read_text(), re.M)
    assert 10 <= len(rows) <= 20
