"""The ema verb: a model whose EMA has another length, chosen after training, and the measure of several lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path

from ldm.cli.command import call
from ldm.config.errors import UserError
from ldm.config.options import option


def main(words: Sequence[str]) -> int:
    """`ldm ema RUN --length X`: the exit code."""
    return call(ema, words, "ldm ema")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Post-hoc EMA: of what run, how long, where to."""

    run: Path = option(MISSING, "A run folder with a stage that has post_hoc_ema.", argument=True)
    stage: str = option("", "The stage; default: the last that has kept averages.")
    length: float | None = option(None, "Length of the EMA, sigma_rel: its spread as a share of training, such as 0.1.")
    out: Path | None = option(None, "Folder for the model; default: RUN/ema/LENGTH.", needs="length")
    sweep: str = option("", "Lengths to measure, such as 0.02,0.05,0.1; the report shows them.")
    n: int = option(
        0,
        "Prompts of scenes with seen pairs, and as many with held-out ones, that a sweep draws; 0: held-out loss alone.",
        needs="sweep",
        low=0,
    )

    def lengths(self) -> list[float]:
        """Those of the sweep.

        Raises:
            UserError: for anything else than numbers, or neither or both of --length and --sweep.
        """
        if (self.length is None) == (not self.sweep):
            raise UserError("length: give either --length 0.1, which makes a model, or --sweep 0.02,0.05,0.1, which measures")
        try:
            return [float(word) for word in self.sweep.split(",")] if self.sweep else []
        except ValueError:
            raise UserError(f"sweep: got {self.sweep!r}; write lengths with commas, such as 0.02,0.05,0.1") from None


def ema(wanted: Wanted) -> int:
    """Make a model whose EMA is as long as you like, or measure several lengths (Karras 2023, arXiv 2312.02696)."""
    lengths = wanted.lengths()
    if not (wanted.run / "config.yaml").is_file():
        raise UserError(f"{wanted.run}: no run here; a folder with config.yaml is needed")
    from ldm.runs.averages import POOR, opened, sweep
    from ldm.runs.report import report

    with opened(wanted.run, wanted.stage) as averages:
        for length in [wanted.length] if wanted.length is not None else lengths:
            if (far := averages.snapshots.misfit(length)) > POOR:
                averages.execution.log.note(
                    f"length {length:g}: its snapshots tell it to within {far:.0%}; nearer to post_hoc_ema.lengths is better"
                )
        if wanted.length is not None:
            target = wanted.out or wanted.run / "ema" / f"{wanted.length:g}"
            averages.write(target, wanted.length)
            print(target)
            return 0
        rows = sweep(averages, lengths, wanted.n)
    for row in rows:
        print(", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in row.items()))
    print(report(wanted.run))
    return 0
