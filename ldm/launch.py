"""The verb that trains: words are read and checked as far as that needs no torch, then the run starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ldm.errors import UserError

USAGE = """usage: python train.py CONFIG [key=value ...] [--plan] [--help]

  CONFIG      a YAML file, such as configs/quickstart.yaml, or the config.yaml of a run folder
  key=value   change one field: seed=1, out=DIR, autoencoder.kind=vq, stages.diffusion.images=100000
  --plan      say what would be done, and why, and stop
  --help      this text, and every field with its type, default and meaning
"""


def main(words: Sequence[str]) -> int:
    """`ldm train CONFIG [key=value ...]`: the exit code.

    Raises:
        UserError: on anything the user can mend.
    """
    options = {word for word in words if word.startswith("-")}
    if unknown := options - {"--plan", "--help", "-h"}:
        raise UserError(f"{sorted(unknown)[0]}: no such option; there are --plan and --help, and key=value words")
    if options & {"--help", "-h"}:
        from ldm.config_text import describe
        from ldm.run import Run

        print(USAGE)
        print(describe(Run))
        return 0
    files = [word for word in words if word not in options and "=" not in word]
    if len(files) != 1:
        raise UserError(f"one CONFIG file is needed, got {' '.join(files) or 'none'}\n\n{USAGE}")
    from ldm.config import build, read

    file = Path(files[0])
    # The types of the fields stand beside the networks and load torch; what YAML and words have wrong is said before.
    values = read(file, [word for word in words if "=" in word and word not in options])
    from ldm.run import Run, execute, place

    run, out = place(build(values, Run, str(file)), file)
    return execute(run, out, only_plan="--plan" in options)
