"""Commands that build alignment subspaces."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trl_safety.cli.base import app, errors
from trl_safety.cli.show import relative_error

if TYPE_CHECKING:
    from trl_safety.subspace.artifact import AlignmentSubspace


@app.command()
def subspace(
    base: Annotated[
        str,
        typer.Argument(
            help="The unaligned model: local folder or Hub id. With --from-adapter, the model to fine-tune.", show_default=False
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write (.safetensors).", show_default=False)],
    aligned: Annotated[
        str | None, typer.Argument(help="The aligned model: local folder or Hub id; none with --from-adapter.", show_default=False)
    ] = None,
    from_adapter: Annotated[
        str | None,
        typer.Option(help="V is the update of this LoRA, which was trained on BASE to refuse: folder or Hub id.", metavar="ADAPTER"),
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Use the layers of this adapter.")] = None,
    target_modules: Annotated[str | None, typer.Option(help="Comma-separated name endings of layers, or all-linear.")] = None,
    rank: Annotated[int | None, typer.Option(help="Singular directions to keep per layer.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="Keep enough of them to bring C's relative error below this.")] = None,
    whole: Annotated[bool, typer.Option("--whole", help="Keep V itself, for an exact C.")] = False,
    base_revision: Annotated[str | None, typer.Option(help="Hub revision of BASE.")] = None,
    aligned_revision: Annotated[str | None, typer.Option(help="Hub revision of ALIGNED.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute; a GPU when there is one.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with ALIGNED.")] = False,
    push_to_hub: Annotated[str | None, typer.Option(help="Also upload to this Hub repository.", metavar="REPO")] = None,
) -> None:
    """Build the alignment subspace of a base/aligned pair, reading both tensor by tensor; or of a model and an adapter that refuses."""
    with errors():
        from trl_safety.errors import SubspaceError
        from trl_safety.subspace.artifact import AlignmentSubspace
        from trl_safety.subspace.build import build_subspace

        if from_adapter is not None:
            used = {
                "ALIGNED": aligned,
                "--adapter": adapter,
                "--target-modules": target_modules,
                "--whole": whole,
                "--aligned-revision": aligned_revision,
                "--device": device,
            }
            if unused := [name for name, value in used.items() if value]:
                raise SubspaceError(
                    f"{unused[0]} = {str(used[unused[0]])!r}: is not used with --from-adapter, which takes V and its layers from the adapter: remove it"
                )
            made = AlignmentSubspace.from_adapter(
                base, from_adapter, rank=rank, tolerance=tolerance, revision=base_revision, trust_remote_code=trust_remote_code
            )
            made.save(output)
            _say(made, output)
            if push_to_hub:
                typer.echo(made.push_to_hub(push_to_hub))
            return
        if aligned is None:
            raise SubspaceError("ALIGNED is missing: name the aligned model after the base, or --from-adapter for a model without a base")
        targets: Any = target_modules
        if target_modules is not None and target_modules.lower() != "all-linear":
            targets = [entry.strip() for entry in target_modules.split(",") if entry.strip()]
        built = build_subspace(
            output,
            base,
            aligned,
            target_modules=targets,
            adapter=adapter,
            rank=rank,
            tolerance=tolerance,
            whole=whole,
            base_revision=base_revision,
            aligned_revision=aligned_revision,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        _say(built, output)
        if push_to_hub:
            typer.echo(built.push_to_hub(push_to_hub))


def _say(built: AlignmentSubspace, output: Path) -> None:
    ranks = sorted(layer.rank for layer in built.layers.values())
    relative = max(relative_error(layer) for layer in built.layers.values())
    typer.echo(
        f"{output}: {len(built.layers)} layers, rank {ranks[0]} to {ranks[-1]}, {output.stat().st_size / 1e6:.1f} MB; "
        f"C is exact to {relative:.2g} of its norm"
    )
    if built.provenance.adapter is not None:
        typer.echo(f"V is {built.provenance.origin}")
