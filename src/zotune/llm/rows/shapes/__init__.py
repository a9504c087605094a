"""The shapes of rows, one module each, and the table of them.

Start with `completion`. Each module has a pure function from a row to its meaning, and the `Shape` that names the
columns that it reads.
"""

from zotune.llm.rows.shape import Shape
from zotune.llm.rows.shapes.alpaca import ALPACA
from zotune.llm.rows.shapes.chat import CHAT
from zotune.llm.rows.shapes.choice import CHOICE
from zotune.llm.rows.shapes.classification import CLASSIFICATION
from zotune.llm.rows.shapes.completion import COMPLETION
from zotune.llm.rows.shapes.plain_text import TEXT
from zotune.llm.rows.shapes.prompt_alone import PROMPT
from zotune.llm.rows.shapes.sharegpt import SHAREGPT

# The shape of rows that only a reward function can score.
PROMPT_ALONE = "prompt"
# The shape of rows with a text and nothing else that a shape reads.
PLAIN_TEXT = "text"

SHAPES: dict[str, Shape] = {
    "classification": CLASSIFICATION,
    "completion": COMPLETION,
    "chat": CHAT,
    "choice": CHOICE,
    "alpaca": ALPACA,
    "sharegpt": SHAREGPT,
    PROMPT_ALONE: PROMPT,
    PLAIN_TEXT: TEXT,
}
"""The shapes by name, for the command line, the docs and the tests."""
