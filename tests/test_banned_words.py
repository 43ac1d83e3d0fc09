"""`.ci/banned_words.py`: a banned word is printed with file, line and replacement; a clean text is not."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "banned_words.py"

if not SCRIPT.is_file():
    pytest.skip("the source distribution has no .ci folder", allow_module_level=True)

spec = importlib.util.spec_from_file_location("banned_words", SCRIPT)
banned_words = importlib.util.module_from_spec(spec)
spec.loader.exec_module(banned_words)

CLEAN = '''"""Compute the color of each token."""


def compute_color(token: str) -> str:
    """Return the color of a token, for any tokenizer; otherwise raise, as promised."""
    color = token  # exercise, precise, advised, supervised, noise, the center of the promise
    return color
'''


def check(name, text):
    return banned_words.check_file(Path(name), text)


@pytest.mark.parametrize("name", ["ppo_plus/algo/x.py", "tests/test_x.py", "recipes/x.py"])
def test_a_clean_text_has_no_faults(name):
    assert check(name, CLEAN) == []


@pytest.mark.parametrize(
    ("word", "replacement"),
    [
        ("colour", "color"), ("Behaviour", "behavior"), ("neighbours", "neighbor"), ("centred", "center"),
        ("optimised", "-ize"), ("normalisation", "-ize"), ("modelling", "modeling"), ("licence", "license"),
    ],
)  # fmt: skip
def test_a_british_spelling_is_found_with_file_line_and_replacement(word, replacement):
    (fault,) = check("tests/test_x.py", f"x = 1\n# the {word} of it\n")
    assert fault.startswith(f"tests/test_x.py:2: '{word}'") and replacement in fault


@pytest.mark.parametrize("word", ["foretells", "nobody", "wishes", "heeds", "go_on", "at rest", "goes on", "says"])
def test_private_words_are_found_in_the_package_and_not_in_tests(word):
    text = f"# a model {word} here\n"
    (fault,) = check("ppo_plus/algo/x.py", text)
    assert fault.startswith("ppo_plus/algo/x.py:1: ") and repr(word) in fault
    assert check("tests/test_x.py", text) == []


@pytest.mark.parametrize(
    ("code", "line", "fault"),
    [
        ('"""Of each row, its length."""\n', 1, "start with an imperative verb"),
        ('def f():\n    """Return ' + "one more word " * 7 + '"""\n', 2, "at most 20 words"),
        ("x = 1\nown = x\n", 2, "'own'"),
        ("for found in range(3):\n    pass\n", 1, "'found'"),
    ],
)
def test_faults_of_docstrings_and_local_names_are_found(code, line, fault):
    (message,) = check("ppo_plus/algo/x.py", code)
    assert message.startswith(f"ppo_plus/algo/x.py:{line}: ") and fault in message


def test_names_that_contain_a_banned_word_are_not_faults():
    assert (
        check("ppo_plus/algo/x.py", "wishbone = asking_price = beside_x = 1  # non-stop-goes on-call, essays\n") == []
    )


PAGE = """A `says` function.

```python
says = "nobody"  # colour
```

<!-- table -->

| nobody | colour |

<!-- /table -->

It says so.
"""


def test_code_and_generated_text_of_a_page_may_contain_private_words():
    faults = check("docs/x.md", PAGE)
    assert [fault.partition(": ")[0] for fault in faults] == ["docs/x.md:4", "docs/x.md:13", "docs/x.md:13"]
    assert "'colour'" in faults[0] and "'says so'" in faults[1] + faults[2]
    lines = {fault.partition(": ")[0] for fault in check("docs/x.md", PAGE.replace("table -->", "").replace("`", ""))}
    assert lines == {f"docs/x.md:{line}" for line in (1, 4, 9, 13)}


def test_private_words_are_found_in_docstrings_messages_and_comments():
    code = '''"""A model\nsays."""

raise ValueError(
    f"{1} nobody"
    "says"
)  # somebody
'''
    assert len(check("ppo_plus/algo/x.py", code)) == 4


def test_the_exit_status_tells_whether_there_are_faults(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(banned_words, "ROOT", tmp_path)
    folder = tmp_path / "ppo_plus"
    folder.mkdir()
    (folder / "clean.py").write_text(CLEAN, encoding="utf-8")
    (folder / "data.json").write_text('"colour"', encoding="utf-8")
    assert banned_words.main([str(folder)]) == 0
    assert capsys.readouterr().out == "No banned words.\n"
    (folder / "page.md").write_text("one\ntwo\nA grey page.\n", encoding="utf-8")
    assert banned_words.main([str(folder)]) == 1
    assert capsys.readouterr().out == "ppo_plus/page.md:3: 'grey': write gray\n"
