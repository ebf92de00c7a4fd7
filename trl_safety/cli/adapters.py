"""Commands that examine saved adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trl_safety.cli.base import Adapter, app, errors
from trl_safety.cli.show import print_base_check, print_report, print_selection, print_view


@app.command()
def verify(adapter: Adapter) -> None:
    """Check that an adapter was protected and is unchanged since. Exit status 0 only then."""
    with errors():
        from trl_safety.reports.report import verify as check

        report = check(adapter)
        print_report(report)
        idle = [method.name for method in report.methods if not method.acted]
        which = f"protected, but not by {' and '.join(idle)}," if idle else "protected,"
        typer.secho(f"{adapter}: {which} and it matches its report", fg="yellow" if idle else "green")


@app.command()
def inspect(
    adapter: Annotated[Path, typer.Argument(help="Folder of a saved adapter; with --selection the output folder of the run.")],
    subspace: Annotated[
        str | None, typer.Option("--subspace", "-s", help="Subspace file or Hub id; not needed with --selection.", show_default=False)
    ] = None,
    selection: Annotated[bool, typer.Option("--selection", help="List the samples that were dropped most often.")] = False,
    top: Annotated[int, typer.Option(min=1, help="With --selection: how many samples.")] = 20,
    plot: Annotated[Path | None, typer.Option(help="Write a plot (PNG).")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the numbers (JSON).")] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute; a GPU when there is one.")] = None,
) -> None:
    """Compare what an adapter changed in every layer with the alignment subspace; or list the samples that were dropped."""
    with errors():
        from trl_safety.errors import ConfigurationError

        if selection:
            from trl_safety.reports.selection import read_selection, write_selection

            unused = [name for name, value in (("--subspace", subspace), ("--plot", plot), ("--device", device)) if value]
            if unused:
                raise ConfigurationError(f"{unused[0]}: has no effect with --selection; remove it")
            rows = read_selection(adapter)
            print_selection(rows, top)
            if json:
                write_selection(rows, json)
            return
        if subspace is None:
            raise ConfigurationError(
                "--subspace is missing: give the file made by `trl-safety subspace`, or --selection for a run that selects samples"
            )
        from trl_safety.inspection import layers as inspection
        from trl_safety.subspace.artifact import AlignmentSubspace

        view = inspection.inspect_adapter(adapter, AlignmentSubspace.from_pretrained(subspace), device=device)
        print_view(view)
        print_base_check(view.base_check)
        if json:
            inspection.write_json(view, json)
        if plot:
            inspection.plot(view, plot)
