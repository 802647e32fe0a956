"""The long forms of the tests, one part after the other.

Run by `python -m benchmarks.soak [PART ...]`, on an idle machine. Enters: the names of parts, all of them by default.
Leaves: a table of figures for each, in `benchmarks/results/`; exit code 1 where a limit is exceeded or a promise is
broken.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib import import_module
from pathlib import Path

from benchmarks.results import this_machine, today
from benchmarks.soak.figures import Soaked

PARTS = ("unchanged", "ranks", "kill", "sinks", "long", "scale")
RESULTS = Path(__file__).parents[1] / "results"


def run(part: str) -> Soaked:
    """One part.

    Raises:
        AssertionError: a promise is broken.
    """
    module = import_module(f"benchmarks.soak.{part}")
    began = time.monotonic()
    figures = module.soak(lambda text: print(f"  {text}", file=sys.stderr, flush=True))
    about = " ".join((module.__doc__ or "").strip().split("\n\n")[0].split())
    return Soaked(part, about, today(), this_machine(), (time.monotonic() - began) / 60, tuple(figures))


def main() -> int:
    """Run the parts and write what they measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    broken = False
    for part in options.parts or PARTS:
        print(part, file=sys.stderr, flush=True)
        try:
            soaked = run(part)
        except AssertionError as error:
            print(f"{part}: {error}", file=sys.stderr)
            broken = True
            continue
        print(soaked.write(options.out).read_text(encoding="utf-8"))
        broken = broken or not all(figure.kept for figure in soaked.figures)
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
