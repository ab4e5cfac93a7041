"""Words of texts, by datatrove's rules for each language.

In: a language (ISO 639-3) and a text. Out: its words. Nothing is downloaded: a language that needs that is refused.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from data_prep.errors import UserError


class Words:
    """datatrove's tokenizer of words, which remembers its last text: several filters ask for the same."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._last: tuple[str, list[str]] = ("", [])

    def word_tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        if text != self._last[0]:
            self._last = (text, self.tokenizer.word_tokenize(text))
        return self._last[1]


@cache
def load_words(language: str) -> Words:
    """The words of a language, once in each process."""
    from datatrove.utils.word_tokenizers import load_word_tokenizer

    return Words(load_word_tokenizer(language))


def check_language(name: str, language: str) -> None:
    """Refuse a language whose words cannot be told apart without a download.

    Raises:
        UserError: an unknown language, or one that needs more than the extra installs.
    """
    from datatrove.utils.word_tokenizers import StanzaTokenizer, load_word_tokenizer

    try:
        tokenizer = load_word_tokenizer(language)
    except ValueError as error:
        raise UserError(
            f"filters.{name}.language is {language} but datatrove knows no rules for its words. Write an ISO 639-3 "
            "code such as eng, deu or fra; the list is datatrove's assets/tokenizer_assignment.csv."
        ) from error
    except ImportError as error:
        raise UserError(f"filters.{name}.language is {language}, which needs another package. {error}") from error
    if isinstance(tokenizer, StanzaTokenizer):
        raise UserError(
            f"filters.{name}.language is {language}, whose words datatrove finds with a model that stanza downloads "
            "while it runs. Use a language that spaCy has rules for."
        )
