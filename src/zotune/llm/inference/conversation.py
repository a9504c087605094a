"""A chat with a model: what was said so far, and the model's next answer, which appears while it is generated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from zotune.errors import UsageError
from zotune.llm.config.generate import ChatConfig
from zotune.llm.data.readers import LocatedRow
from zotune.llm.data.tokenization import Encoded, LongRowError
from zotune.llm.inference.answers import answers, encode_prompts
from zotune.llm.inference.prompts import style_of, system_messages
from zotune.llm.models.language_model import LanguageModel
from zotune.llm.rows.sources import Rows
from zotune.llm.scoring.streaming import Stream
from zotune.messages import say
from zotune.noise import derive_seed


@dataclass
class Conversation:
    """A chat with a model.

    Args:
        lm: a causal language model whose tokenizer has a chat template.
        options: how texts are generated.

    Attributes:
        messages: what was said so far, `{"role": …, "content": …}`.
        system: the text at the start of the chat, or None.

    Raises:
        UsageError: the model cannot chat.
    """

    lm: LanguageModel
    options: ChatConfig
    messages: list[dict[str, Any]] = field(default_factory=list)
    system: str | None = None

    def __post_init__(self) -> None:
        if self.lm.masked or self.lm.classifies:
            raise UsageError(f"{self.lm.name} does not continue text, so it cannot chat. Use a causal language model.")
        if not getattr(self.lm.tokenizer, "chat_template", None):
            raise UsageError(
                f"the tokenizer of {self.lm.name} has no chat template, so the model cannot chat. Use a model that was "
                f"trained for chats, or let this one continue a text: zotune generate --model {self.lm.name}"
            )
        self.system = self.options.system_prompt if self.system is None else self.system
        self._style = style_of(self.options, self.lm.tokenizer, "chat")

    def reset(self) -> None:
        """Begin a new chat, with the same system text."""
        self.messages.clear()

    def answer(self, text: str, stream: Stream) -> str:
        """Return the model's answer to a message of the user; both belong to the chat from then on.

        An answer that `stream` stops belongs to it as far as it goes; without any of it the message is taken back.

        Args:
            text: the message.
            stream: where the answer goes while it is generated.

        Raises:
            UsageError: the message is too long for the model, or its chat template rejects the chat.
        """
        prompt, messages = self._prompt([*self.messages, {"role": "user", "content": text}])
        seed = derive_seed(self.options.seed, len(self.messages))
        (said,) = answers(self.lm, [prompt], self._style.config, seed, stream)
        if said:
            self.messages = [*messages, {"role": "assistant", "content": said}]
        return said

    def _prompt(self, messages: list[dict[str, Any]]) -> tuple[Encoded, list[dict[str, Any]]]:
        """Return the prompt of a chat, and the chat without its oldest turns if it is too long with them."""
        left_out, column = 0, self._style.column("messages")
        while True:
            row = LocatedRow("the chat", {column: [*system_messages(self.system), *messages]})
            try:
                (prompt,) = encode_prompts(self.lm, Rows("chat", [row]), self._style.config)
            except LongRowError:
                if len(messages) < 2:
                    raise
                messages, left_out = messages[2:], left_out + 1
                continue
            if left_out:
                say(f"the chat is too long for the model, so its oldest messages ({left_out} of yours) are left out")
            return prompt, messages
