"""What verifiers pay for answers that solve nothing, and for right answers in another form than they read.

    python benchmarks/verifiers.py [--items 16] [--out benchmarks/results/verifiers.json]

Measures what is installed of math-verify, reasoning-gym and IFEval's checkers (if-verifiable), each in its own scorer;
ppo_plus is not needed. `pip install math-verify==0.9.0 reasoning-gym==0.1.25 if-verifiable==0.1.2` gives the versions
of the committed result. A score is a mean over items, "raises" where the scorer raised on any. Items whose data set
holds no reference answer, as many solve each of them, have none of the rows that are made of it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import random
import signal
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SECONDS = 30  # for one score, or the items of one data set; what takes longer is left out
THINKING = "Let me think about it once more. "

# What an answer is made of: the reference answer and the question.
ANSWERS: dict[str, Callable[[str, str], str]] = {
    "right": lambda right, question: right,
    "empty": lambda right, question: "",
    "full stop": lambda right, question: ".",
    "refusal": lambda right, question: "I do not know.",
    "question": lambda right, question: question,
    "in a sentence": lambda right, question: f"The answer is {right}.",
    "line breaks around it": lambda right, question: f"\n{right}\n",
    "padded": lambda right, question: f"{THINKING * 40}\n{right}\n{THINKING * 40}",
    "repeated": lambda right, question: "\n".join([right] * 5),
    "and a wrong one": lambda right, question: f"{right} or 7777",
}
NEEDS_RIGHT = ("right", "in a sentence", "line breaks around it", "padded", "repeated", "and a wrong one")

PROBLEMS = (
    ("What is $17 + 25$?", "42"),
    ("Simplify $\\frac{6}{8}$.", "\\frac{3}{4}"),
    ("Solve $x^2 - 3x + 2 = 0$.", "\\{1, 2\\}"),
    ("Expand $(x + 1)^2$.", "x^2 + 2x + 1"),
    ("Where is $(x - 1)(x - 2)$ negative?", "(1, 2)"),
    ("Simplify $\\sqrt{12}$.", "2\\sqrt{3}"),
    ("Compute $\\int_0^2 6 dx$.", "12"),
    ("Which part of $80$ is $40$?", "50\\%"),
    ("What is $25 \\cdot 40$?", "1{,}000"),
    ("Solve $2x + 1 = 7$.", "x = 3"),
)
ESSAY = "A good walk begins early in the morning and ends at a small cafe near the river"


def available() -> dict[str, Callable[[int], dict]]:
    """The measurements whose packages are installed, by the name of the package."""
    known = {
        "math-verify": ("math_verify", math_verify),
        "reasoning-gym": ("reasoning_gym", reasoning_gym),
        "if-verifiable": ("if_verifiable", ifeval),
    }
    return {name: measure for name, (module, measure) in known.items() if importlib.util.find_spec(module)}


def math_verify(items: int) -> dict[str, dict]:
    """Score by form of the answer: as formula, in `\\boxed{}`, and as plain text."""
    from math_verify import parse, verify

    def score(i: int, kind: str, pattern: str) -> float:
        question, right = PROBLEMS[i]
        answer = ANSWERS[kind](pattern.format(right), question)
        return float(verify(parse(f"${right}$"), parse(answer)))

    patterns = {"formula": "${}$", "boxed": "\\boxed{{{}}}", "plain text": "{}"}
    return {
        form: {kind: mean(lambda i, k=kind, p=pattern: score(i, k, p), len(PROBLEMS)) for kind in ANSWERS}
        for form, pattern in patterns.items()
    }


def reasoning_gym(items: int) -> dict[str, dict]:
    """Score by data set."""
    from reasoning_gym.factory import DATASETS, create_dataset

    found: dict[str, dict] = {}
    for name in sorted(set(DATASETS) - {"composite"}):  # made of others
        try:
            with time_limit():
                random.seed(0)  # some draw from the global generator
                data = create_dataset(name, size=items, seed=3)
                rows = [data[i] for i in range(items)]
        except TimeoutError:
            continue
        solved = all(isinstance(row["answer"], str) for row in rows)

        def score(i: int, kind: str, data: Any = data, rows: list = rows) -> float:
            return float(data.score_answer(ANSWERS[kind](rows[i]["answer"], rows[i]["question"]), rows[i]))

        kinds = [kind for kind in ANSWERS if solved or kind not in NEEDS_RIGHT]
        found[name] = {kind: mean(lambda i, k=kind, s=score: s(i, k), items) for kind in kinds}
    return found


def ifeval(items: int) -> dict[str, dict]:
    """Share of items by instruction whose checker says "followed"; the answers know nothing of the instruction."""
    import langdetect
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

    langdetect.DetectorFactory.seed = 0
    answers: dict[str, Callable[[str], str]] = {
        "empty": lambda question: "",
        "full stop": lambda question: ".",
        "question": lambda question: question,
        "one sentence": lambda question: f"{ESSAY}.",
        "padded": lambda question: f"{THINKING * 40}\n{ESSAY}.\n{THINKING * 40}",
        "repeated": lambda question: "\n\n".join([f"{ESSAY}."] * 20),
    }
    found = {}
    for name, checker_class in INSTRUCTION_DICT.items():

        def score(i: int, kind: str, name: str = name, checker_class: Any = checker_class) -> float:
            random.seed(i)  # what the instruction asks for is drawn
            checker = checker_class(name)
            options = {"prompt_to_repeat": "Write about a walk."} if name.endswith("repeat_prompt") else {}
            question = f"Write about a walk. {checker.build_description(**options)}"
            return float(checker.check_following(answers[kind](question)))

        found[name] = {kind: mean(lambda i, k=kind, s=score: s(i, k), items) for kind in answers}
    return found


def mean(score: Callable[[int], float], items: int) -> float | str:
    """The mean score over items; "raises" where one cannot be scored, "no data" where a download would be needed."""
    try:
        with time_limit():
            return round(statistics.fmean(score(i) for i in range(items)), 4)
    except TimeoutError:
        return "takes long"
    except LookupError as error:
        return "no data" if "download" in str(error) else "raises"
    except Exception:
        return "raises"


@contextlib.contextmanager
def time_limit(seconds: int = SECONDS) -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=16, help="items of each data set and checker")
    parser.add_argument("--out", type=Path, default=RESULTS / "verifiers.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)  # each language that cannot be detected is one
    measurements = available()
    if not measurements:
        sys.exit("Nothing to measure: pip install math-verify reasoning-gym if-verifiable")
    result: dict[str, Any] = {"items": args.items, "date": date.today().isoformat()}
    for name, measure in measurements.items():
        result[name] = {"version": importlib.metadata.version(name), "scores": measure(args.items)}
        print(f"{name}: {len(result[name]['scores'])} scorers", flush=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
