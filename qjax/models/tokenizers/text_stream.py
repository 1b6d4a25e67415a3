"""The text of tokens as they come, without half characters."""

from __future__ import annotations

from qjax.models.tokenizers.tokenizer import Tokenizer

__all__ = ["TextStream"]


class TextStream:
    """Gives out text token by token; what is given out, joined, is the decoded whole."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._ids, self._given = tokenizer, [], ""

    def add(self, token: int) -> str:
        """The text that is certain now and was not given out before: nothing while a character is incomplete."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd"):  # bytes of a character of which more may follow
            return ""
        return self._take(text)

    def rest(self) -> str:
        """The text that was held back."""
        return self._take(self._tokenizer.decode(self._ids))

    def _take(self, text: str) -> str:
        new = text[len(self._given) :]
        self._given = text
        return new
