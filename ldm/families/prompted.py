"""Prompts of families that read them by a text encoder: their length, and what of them it knows."""

from __future__ import annotations

from ldm.families.draws import Draws
from ldm.text.encoder import TextEncoder
from ldm.text.prompt_syntax import Prompt
from ldm.text.weighted import chunks_of


class Prompted(Draws):
    """What draws by prompts that a text encoder reads, one chunk of them unless it says otherwise."""

    reader: TextEncoder | None  # None: it has none

    @property
    def text(self) -> TextEncoder:
        """The text encoder of what has one."""
        assert self.reader is not None, "it neither reads nor writes words"
        return self.reader

    def overlong(self, prompt: Prompt) -> str:
        """How a prompt is read that is longer than the text encoder reads at once; empty: it is not."""
        longer = self.reads_prompts and any(len(chunks_of(self.text, pieces)) > 1 for pieces in prompt.at(0, 1))
        return f"is longer than the model's {self.text.max_tokens} tokens; the rest is left out" if longer else ""

    def says(self, prompt: str, word: str) -> bool:
        """Whether a prompt has a learned word in it, as the text encoder reads it."""
        return self.reads_prompts and self.text.says(prompt, word)

    def untaught(self, prompt: str) -> list[str]:
        """As its text encoder says."""
        return self.text.untaught(prompt) if self.reads_prompts else []

    def tokens(self, prompt: Prompt) -> tuple[int, int] | None:
        """Of the words, without the special tokens; of several prompts joined by AND the longest."""
        if not self.reads_prompts:
            return None
        counts = [sum(len(chunk.ids) for chunk in chunks_of(self.text, pieces)) for pieces in prompt.at(0, 1)]
        return max(counts), self.text.room

    def unknown(self, prompt: str) -> list[str]:
        """The words of a prompt that a tokenizer of the run's own captions has never met."""
        return self.text.unknown(prompt) if self.reads_prompts else []

    def misspelt(self, prompt: str) -> dict[str, str]:
        """The words of a prompt that such a tokenizer reads in pieces, and the whole word that each is most like."""
        return self.text.misspelt(prompt) if self.reads_prompts else {}
