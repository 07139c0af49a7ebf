"""Word and character error rates, by speaker and by source."""

from __future__ import annotations

from collections import defaultdict

from rich.table import Table
from torchmetrics.text import CharErrorRate, WordErrorRate

__all__ = ["NORMALISER", "ErrorRates", "normalise"]

NORMALISER = (
    "Unicode case folding; apostrophes removed; every character that is neither letter nor digit becomes a space; "
    "runs of spaces become one. Numbers are not spelled out, and no word is replaced."
)
"""What `normalise` does, for every result that is written down."""


def normalise(text: str) -> str:
    """Letters, digits and single spaces, in lower case; see `NORMALISER`."""
    plain = text.casefold().replace("'", "").replace("’", "")
    return " ".join("".join(char if char.isalnum() else " " for char in plain).split())


class ErrorRates:
    """Error rates of transcripts over all, and over those of each speaker and source.

    Substitutions, deletions and insertions of a group ÷ its reference words (WER) or characters (CER), by torchmetrics.
    """

    def __init__(self) -> None:
        # Without synchronisation: one process may hold all transcripts while the others go on.
        self._rates: dict[tuple[str, str], tuple[WordErrorRate, CharErrorRate]] = defaultdict(
            lambda: (WordErrorRate(sync_on_compute=False), CharErrorRate(sync_on_compute=False))
        )
        self._counts: dict[tuple[str, str], int] = defaultdict(int)
        self._unspoken = 0

    def update(self, text: str, heard: str, *, speaker: str, source: str) -> None:
        """Add one transcript; a reference without a letter or digit is counted apart.

        Args:
            text: Reference.
            heard: Hypothesis.
            speaker: Who says it.
            source: Where it comes from.
        """
        reference, hypothesis = normalise(text), normalise(heard)
        if not reference:
            self._unspoken += 1
            return
        for group in (("all", "all"), ("speaker", speaker), ("source", source)):
            for rate in self._rates[group]:
                rate.update([hypothesis], [reference])
            self._counts[group] += 1

    def results(self) -> dict[str, object]:
        """``{"normaliser", "empty_references", "all": {"wer", "cer", "texts"}, "speaker": {…}, "source": {…}}``."""
        found: dict[str, dict[str, dict[str, float]]] = {"all": {}, "speaker": {}, "source": {}}
        for (kind, name), (words, characters) in sorted(self._rates.items()):
            figures = {"wer": float(words.compute()), "cer": float(characters.compute())}
            found[kind][name] = {**figures, "texts": self._counts[kind, name]}
        every = found.pop("all").get("all", {})
        return {"normaliser": NORMALISER, "empty_references": self._unspoken, "all": every, **found}

    def table(self, title: str) -> Table:
        """Everything, for the terminal."""
        table = Table(title=title)
        for column in ("", "WER", "CER", "texts"):
            table.add_column(column, justify="left" if not column else "right")
        for kind in ("source", "speaker", "all"):
            for (group, name), (words, characters) in sorted(self._rates.items()):
                if group == kind:
                    label = "all" if kind == "all" else f"{kind} {name}"
                    rates = (f"{float(rate.compute()):.3f}" for rate in (words, characters))
                    table.add_row(label, *rates, str(self._counts[group, name]))
            table.add_section()
        return table
