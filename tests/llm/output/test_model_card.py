"""The model card shows names of models, files and functions as text, held against a renderer of Markdown."""

import re
from types import SimpleNamespace

import pytest
from markdown_it import MarkdownIt

from zotune.llm.output.model_card import model_card

RESULTS = {"num_tuned": 1, "best_step": 2, "num_steps": 3, "num_forwards": 4, "seconds": 5.0, "peak_memory": 6}
HOSTILE = "x|y <img src=x onerror=alert(1)> [a](javascript:b) `c` **d**\n# e\n```\n<script>f</script>\x1b[2J"
RENDERER = MarkdownIt("commonmark", {"html": True}).enable("table")


@pytest.mark.parametrize("where", ["model", "train_file", "metric", "result"])
def test_names_in_the_card_are_text(config, tiny, where):
    options = config()
    test = SimpleNamespace(metric="accuracy", text="90 %")
    if where in ("model", "train_file"):
        options = options.model_copy(update={where: HOSTILE})
    else:
        setattr(test, {"result": "text"}.get(where, where), HOSTILE)
    evaluation = type("E", (), {"metric": test.metric, "__str__": lambda self: test.text})()
    card = model_card(RESULTS, options, tiny("llama"), evaluation)
    assert "\x1b" not in card
    page = RENDERER.render(card.partition("---\n\n")[2])
    tags = set(re.findall(r"<([a-z0-9]+)", page))
    assert tags <= {"h1", "p", "code", "pre", "table", "thead", "tbody", "tr", "th", "td"}
    assert page.count("<h1>") == page.count("<pre>") == page.count("<table>") == 1
    assert page.count("<tr>") == 9  # the empty head, and eight properties
