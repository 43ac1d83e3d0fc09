"""Turns, tool calls and observations on the report page: its data, and what its script draws of it."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
import torch
from agents import add, make_tool_model, questions, right_sum, tool_tokenizer
from conftest import make_trainer
from test_report import Recorder, example_run

from ppo_plus.report import REPORT, read_run, write_page
from ppo_plus.report.samples import MAX_CALL_CHARACTERS, MAX_CHARACTERS, _answer, _call_text, _segments

NODE = shutil.which("node")
# The part of a browser's document that the page's script uses; prints the drawn page as nested [tag, class, children].
DOCUMENT = """
class Node {
  constructor(tag) { Object.assign(this, { tag, children: [], attributes: {}, style: {}, dataset: {}, events: {} }); }
  append(...children) { this.children.push(...children); }
  replaceChildren(...children) { this.children = children; }
  setAttribute(name, value) {
    this.attributes[name] = value;
    if (name.startsWith("data-")) this.dataset[name.slice(5)] = value;
  }
  addEventListener(name, listener) { this.events[name] = listener; }
  set textContent(text) { this.children = [text]; }
  get textContent() { return this.children.map(c => c instanceof Node ? c.textContent : c).join(""); }
  get value() { return (this.children.find(c => "selected" in c.attributes) ?? this.children[0]).attributes.value; }
  getBoundingClientRect() { return { left: 0, top: 0, right: 0, bottom: 0, width: 1, height: 1 }; }
  all() { return this.children.filter(c => c instanceof Node).flatMap(c => [c, ...c.all()]); }
  querySelectorAll(_) { return this.all().filter(c => "i" in c.dataset); }
}
const [before, data, script] = JSON.parse(require("fs").readFileSync(0, "utf8"));
const nodes = { data: new Node("script"), page: new Node("main"), tip: new Node("div") };
nodes.data.textContent = data;
globalThis.document = { createElement: t => new Node(t), createElementNS: (_, t) => new Node(t),
  getElementById: id => nodes[id], title: "" };
Object.assign(globalThis, { innerWidth: 1000, innerHeight: 1000, addEventListener: () => {} });
new Function(script)();
const draw = node => node instanceof Node
  ? [node.tag, node.attributes.class ?? "", node.style.background ?? "", node.children.map(draw)] : String(node);
const tips = nodes.page.all().filter(n => n.attributes.class === "tokens").map(text =>
  text.querySelectorAll().map(token => {
    text.events.pointermove({ target: token, clientX: 0, clientY: 0 });
    return nodes.tip.textContent;
  }));
console.log(JSON.stringify([draw(nodes.page), tips]));
"""


def drawn(page):
    """What the script of a page draws, as nested [tag, class, color, children], and the tip of each token."""
    text = page.read_text()
    data, script = (part.split("</script>")[0] for part in text.split("<script")[1:])
    message = json.dumps(["", data.split(">", 1)[1], script.split(">", 1)[1]])
    done = subprocess.run([NODE, "-e", DOCUMENT], input=message, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def text_of(node):
    return node if isinstance(node, str) else "".join(map(text_of, node[3]))


def find(node, css_class):
    """All nodes of a class, in the order of the page."""
    if isinstance(node, str):
        return []
    return [node] * (css_class in node[1].split()) + [found for child in node[3] for found in find(child, css_class)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short training with a tool, and its rollouts."""
    folder, recorder = tmp_path_factory.mktemp("run"), Recorder()
    trainer = make_trainer(
        folder, model=make_tool_model(), processing_class=tool_tokenizer(), train_dataset=questions(), tools=[add],
        reward_funcs=right_sum, callbacks=[recorder],
        config={"response_length": 120, "temperature": 0.5, "learning_rate": 1e-3, "max_steps": 4, "html_report": True},
    )  # fmt: skip
    trainer.train()
    return folder / REPORT, recorder.rollouts


def test_segments_are_the_turns_and_observations_of_the_rollout(run):
    page, ((_, rollout, samples, _), *_) = run
    responses = read_run(page)["rollouts"][0]["responses"]
    rows = rollout.sequence_scores.argsort(descending=True, stable=True).tolist()
    for row, response in zip(rows, responses, strict=True):
        first, observation, last = response["segments"]
        assert [s["observation"] for s in response["segments"]] == [False, True, False]
        assert (first["start"], last["end"]) == (0, response["length"]) == (0, len(response["tokens"]))
        assert (first["end"], observation["end"]) == (observation["start"], last["start"])
        observed = rollout.observation_mask[row].nonzero()[:, 0].tolist()
        assert observed == list(range(observation["start"], observation["end"]))
        messages = samples.completions.completions[row]
        shown = "".join(response["tokens"][observation["start"] : observation["end"]])
        assert messages[1]["content"] in shown and "<|im_start|>tool" in shown
        assert first["calls"] == [f"add({messages[0]['tool_calls'][0]['function']['arguments']})"] and not last["calls"]


def test_answers_have_lines_with_their_kinds(run):
    rows = read_run(run[0])["answers"][0]["rows"]
    for row in rows:
        assert [kind for kind, _ in row["parts"]] == ["assistant", "call", "tool", "assistant"]
        assert "\n".join(text for _, text in row["parts"]) == row["answer"]


def test_long_lines_are_cut_with_the_answer():
    long = [{"role": "assistant", "content": "a" * 500}, {"role": "tool", "content": "b" * 5000},
            {"role": "assistant", "content": "c"}]  # fmt: skip
    parts = _answer(long)["parts"]
    assert [kind for kind, _ in parts] == ["assistant", "tool"]
    assert sum(len(text) for _, text in parts) <= MAX_CHARACTERS + len(" […]")
    assert _answer([{"role": "assistant", "content": "a"}]) == {"answer": "assistant: a"}  # one turn as before
    call = {"function": {"name": "f", "arguments": {"x": "y" * 5000}}}
    assert len(_call_text(call)) == MAX_CALL_CHARACTERS + len(" […]")


def test_a_response_without_messages_has_turns_without_calls():
    observed = torch.tensor([False, True, True, False])
    segments = _segments(observed, "text of rollout_func")
    assert [(s["start"], s["end"], s["observation"], s["calls"]) for s in segments] == [
        (0, 1, False, []), (1, 3, True, []), (3, 4, False, []),
    ]  # fmt: skip


@pytest.mark.skipif(NODE is None, reason="no node here")
class TestDrawn:
    def test_turns_calls_and_observations_are_marked(self, run):
        page, tips = drawn(run[0])
        responses = read_run(run[0])["rollouts"][-1]["responses"]
        for card, response, tip in zip(find(page, "response"), responses, tips, strict=True):
            assert "2 turns" in text_of(card)
            marks = [text_of(mark) for mark in find(card, "mark")]
            assert marks == [f"turn 1 · calls {response['segments'][0]['calls'][0]}", "observation", "turn 2"]
            observed = response["segments"][1]
            (block,) = find(card, "observation")
            tokens = response["tokens"][observed["start"] : observed["end"]]
            assert text_of(block) == "".join(t.replace("\n", "↵\n") for t in tokens)
            assert {token[2] for token in block[3]} == {"transparent"}
            for i, text in enumerate(tip):
                inside = observed["start"] <= i < observed["end"]
                assert ("not sampled and not trained" in text) == inside == ("Advantage" not in text)
        table = find(page, "answers")[0]
        rows = read_run(run[0])["answers"][-1]["rows"]
        for kind in ("call", "tool"):
            expected = [text for row in rows for k, text in row["parts"] if k == kind]
            shown = [text_of(node) for node in find(table, kind)]
            assert sorted(shown) == sorted(expected * 2)  # both columns

    def test_colors_leave_observations_out_of_their_range(self, tmp_path):
        example = example_run()
        response = example["rollouts"][0]["responses"][0]
        response |= {"value": [0.4, 0.0, 0.0, 0.5], "advantage": [-2.0, 9.0, 9.0, 1.0]}
        segments = [(0, 1, False), (1, 3, True), (3, 4, False)]
        marked = {**response, "segments": [dict(zip(("start", "end", "observation", "calls"), (*s, []), strict=True))
                                           for s in segments]}  # fmt: skip
        shades = []
        for shown in (response, marked):
            example["rollouts"][0]["responses"] = [shown]
            write_page(tmp_path / REPORT, [example])
            page, _ = drawn(tmp_path / REPORT)
            (tokens,) = find(page, "tokens")
            shades.append(tokens)

        def first_token(node):
            return next(child[2] for child in node[3] if child[0:2] == ["span", ""])

        assert first_token(shades[0]) != first_token(shades[1])  # the range is that of the actions alone
        assert not find(shades[0], "observation") and not find(shades[0], "mark")  # the control
        assert len(find(shades[1], "observation")) == 1

    def test_hostile_calls_stay_text(self, tmp_path):
        example = example_run()
        response = example["rollouts"][0]["responses"][0]
        hostile = "f(</script><img src=x>)"
        response["segments"] = [{"start": 0, "end": 4, "observation": False, "calls": [hostile]}]
        example["answers"][0]["rows"][0]["parts"] = [["call", hostile]]
        write_page(tmp_path / REPORT, [example])
        page, _ = drawn(tmp_path / REPORT)
        assert hostile in text_of(find(page, "mark")[0]) and text_of(find(page, "call")[0]) == hostile
