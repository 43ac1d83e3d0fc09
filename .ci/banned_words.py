"""Check text and code for banned words, and print each with its file, line and replacement.

    python .ci/banned_words.py [PATH ...]

British spellings are checked in all folders. Private words of this project, docstring summaries that are riddles or too
long, and local variables without a meaning are checked in the package, recipes and documentation.

In Markdown, text between two markers `<!-- name -->` and `<!-- /name -->` is not checked, because benchmarks generate
it or a model sampled it, and code is checked for spelling alone.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = (".py", ".md", ".yaml", ".yml", ".html", ".toml", ".txt")
TREE = ("ppo_plus", "recipes", "docs", "tests", "benchmarks", "findings", ".ci", "README.md", "CONTRIBUTING.md",
        "CHANGELOG.md")  # fmt: skip
IDIOM_TREE = ("ppo_plus", "recipes", "docs", "README.md", "CONTRIBUTING.md", "CHANGELOG.md")
IGNORED = (".ci/banned_words.py", "tests/test_banned_words.py")  # they contain the words

ISE_STEMS = (
    "author|categor|central|character|custom|emphas|final|formal|general|global|initial|item|local|material|maxim|memor|"
    "minim|modern|modular|neutral|normal|optim|organ|parallel|parametr|penal|prior|quant|random|real|recogn|regular|"
    "serial|special|stabil|standard|summar|synchron|synthes|token|util|vector|visual"
)
SPELLING = {  # pattern: replacement
    r"\w*colour\w*": "color",
    r"\w*behaviour\w*": "behavior",
    r"\w*favour\w*": "favor",
    r"\w*neighbour\w*": "neighbor",
    r"\w*honour\w*": "honor",
    r"\w*labour\w*": "labor",
    r"centre\w*|centring|centred": "center, centering, centered",
    r"licence\w*": "license",
    r"modelling|modelled": "modeling, modeled",
    r"labelling|labelled": "labeling, labeled",
    r"signalling|signalled": "signaling, signaled",
    r"travelling|travelled": "traveling, traveled",
    r"(un)?cancelling": "canceling",
    rf"(\w*({ISE_STEMS}))is(e|ed|es|er|ers|ing|ation|ations)": "-ize, -ization",
    r"analys(e|ed|ing)": "analyze, analyzed, analyzing",
    r"grey": "gray",
    r"defence|offence": "defense, offense",
    r"artefacts?": "artifact",
    r"catalogue": "catalog",
    r"judgement": "judgment",
    r"towards|backwards|upwards|downwards|afterwards": "toward, backward, upward, downward, afterward",
    r"whilst|amongst": "while, among",
    r"per cent": "percent",
    r"learnt|spelt": "learned, spelled",
    r"fulfil|fulfils": "fulfill, fulfills",
    r"for ever": "forever, without a limit",
}
IDIOM = {  # pattern: replacement
    r"foretells?|foretold|foresaw|foreseen?": "predict",
    r"go_on|goes on|go on|went on|going on": "continue, resume",
    r"wish|wishes|wished": "request, target",
    r"heeds?|heeded": "follow, respect",
    r"nobody|no one|whoever|somebody": "name the subject",
    r"at rest|weights_at_rest": "cached, frozen",
    r"speaks?|spoke|spoken": "run, be active (a model); message, text",
    r"hears?( of)?|heard": "receive, override",
    r"sits? it out": "is dropped, is skipped",
    r"told apart|tells? apart": "distinguish",
    r"aside": "temporary path",
    r"look(s|ed)? at": "check, inspect",
    r"is said|was said|said once|says so": "warn, log",
    r"likelier|likeliest": "more likely, most likely",
    r"hyper-parameters?": "hyperparameter",
    r"stands? (in|at|for|outside|inside|beside)": "is in, is at, means",
    r"beside": "next to, in addition to",
    r"take part|takes part|took part|takes no part": "is used",
    r"let go of": "release",
    r"say|says|said|told": "state, report, warn, log",
    r"ask|asks|asked|asking": "request, call, query",
    r"anew": "again, re-",
    r"at once": "immediately, in one batch",
    r"in the place of": "instead of",
    r"but for|save for": "except for",
    r"hand(s|ed|ing)? on": "pass",
    r"wants?|wanted": "need, require",
    r"knows": "has, receives",
    r"as (it|they) (is|was|are|were|came)": "unchanged",
    r"left alone|left to (itself|themselves)": "unchanged, abandoned",
}
RIDDLES = ("Of ", "What ", "Who ", "Whoever ", "Where ", "Which of ")
LOCALS = {"own", "found", "given", "made", "theirs", "here", "there", "most", "longest", "least"}
MAX_SUMMARY_WORDS = 20
GENERATED = re.compile(r"<!-- ([\w. ]+) -->.*?<!-- /\1 -->", re.DOTALL)
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.DOTALL | re.MULTILINE)


def find_words(text: str, words: dict[str, str]) -> Iterator[tuple[int, str]]:
    """Yield line number and message of each banned word in a text."""
    for pattern, replacement in words.items():
        for match in re.finditer(rf"(?<![\w-])({pattern})(?!\w)", text, re.IGNORECASE):
            yield text.count("\n", 0, match.start()) + 1, f"{match[0]!r}: write {replacement}"


def blank(pattern: re.Pattern, text: str) -> str:
    """Return a text with the same lines, in which the matches of a pattern are left out."""
    return pattern.sub(lambda match: "\n" * match[0].count("\n"), text)


def find_python_faults(text: str) -> Iterator[tuple[int, str]]:
    """Yield line number and message of bad docstring summaries and meaningless local names in Python code."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            summary = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            line = node.body[0].lineno if summary else 1
            if summary.startswith(RIDDLES):
                yield line, f"docstring {summary[:40]!r}: start with an imperative verb or a noun"
            if len(summary.split()) > MAX_SUMMARY_WORDS:
                yield line, f"docstring {summary[:40]!r}: use at most {MAX_SUMMARY_WORDS} words"
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in LOCALS:
            yield node.lineno, f"variable {node.id!r}: name what it contains"


def check_file(path: Path, text: str) -> list[str]:
    """Return the faults of one file, whose path is relative to the repository, as `path:line: message`."""
    name = path.as_posix()
    text = blank(GENERATED, text) if path.suffix == ".md" else text
    faults = list(find_words(text, SPELLING))
    if is_below(name, IDIOM_TREE):
        faults += find_words(blank(CODE, text) if path.suffix == ".md" else text, IDIOM)
        faults += find_python_faults(text) if path.suffix == ".py" else []
    return [f"{name}:{line}: {message}" for line, message in sorted(faults)]


def is_below(name: str, folders: tuple[str, ...]) -> bool:
    """Return whether a path is one of these files or inside one of these folders."""
    return any(name == folder or name.startswith(f"{folder}/") for folder in folders)


def list_files(paths: list[Path]) -> Iterator[Path]:
    """Yield the text files among paths and in folders, without hidden and generated ones."""
    for path in paths:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        yield from (f for f in files if f.suffix in SUFFIXES and f.is_file() and "__pycache__" not in f.parts)


def main(arguments: list[str]) -> int:
    """Check files and folders (all by default), print the faults, and return 1 if there are any."""
    paths = [Path(a).resolve() for a in arguments] or [ROOT / name for name in TREE]
    faults = []
    for file in list_files(paths):
        name = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file
        if name.as_posix() not in IGNORED:
            faults += check_file(name, file.read_text(encoding="utf-8"))
    print("\n".join(faults) or "No banned words.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
