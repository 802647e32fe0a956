"""The commands `bias-audit regions ...`.

Enters: arguments. Leaves: files, text on the terminal and an exit code, as the gate's. Neither torch nor Lightning is
imported unless a command needs it.
"""

from __future__ import annotations

import typer

app = typer.Typer(help="Regions for an audit set: propose, convert, check and choose.", no_args_is_help=True)
