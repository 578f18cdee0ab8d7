"""Writes the notebooks in examples from the scripts beside them, and runs them, so that they hold outputs."""

from pathlib import Path

import click

from modelnew import commands, environment

from .generated import EXAMPLES


def execute(script: Path, timeout: int = 300):
    """The script's notebook with its outputs, as nbformat has it. nbclient.exceptions.CellExecutionError if it fails.

    Cells and metadata of the .ipynb beside the script stay as they are where the script does not say otherwise. When
    and how long cells ran is left out: it would change with each run. The metadata "modelnew" is new: the versions and
    the digest of the kernels that ran, as a record has them.
    """
    import jupytext
    import nbformat
    from jupytext.combine import combine_inputs_with_outputs
    from nbclient import NotebookClient

    notebook, stored = jupytext.read(script), script.with_suffix(".ipynb")
    if stored.exists():
        notebook = combine_inputs_with_outputs(notebook, nbformat.read(stored, as_version=4))
    head = commands.head(environment.device())
    notebook.metadata["modelnew"] = {name: head[name] for name in ("digest", "versions")}
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(script.parent)}},
    )
    return client.execute()


@commands.command()
@click.argument("scripts", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--emulator", is_flag=True, help="Store what the emulator puts out where there is no GPU.")
def command(scripts, emulator):
    """Run the notebooks in examples and store them with their outputs, a GPU's.

    SCRIPTS: of which notebooks.  [default: examples/NN_*.py of the repository]
    """
    try:
        import ipykernel  # noqa: F401
        import jupytext  # noqa: F401
        import nbformat
        from nbclient.exceptions import CellExecutionError, DeadKernelError
    except ImportError as error:
        raise click.ClickException(f"{error}: python3 -m pip install '.[notebooks]'") from error
    scripts = scripts or sorted(EXAMPLES.glob("[0-9]*.py"))
    if not scripts:
        raise click.ClickException(f"there are no scripts in {EXAMPLES}: name them")
    backend = environment.backend()
    if backend["name"] != "cuda" and not emulator:
        raise click.ClickException(
            f"the outputs to store are a GPU's, and {backend['why']}; --emulator stores what it gives"
        )
    for script in scripts:
        try:
            notebook = execute(script)
        except (CellExecutionError, DeadKernelError) as error:
            raise click.ClickException(f"{script} fails, its notebook stays as it was:\n{error}") from error
        nbformat.write(notebook, script.with_suffix(".ipynb"))
        click.echo(f"written: {script.with_suffix('.ipynb')}")


if __name__ == "__main__":
    command()
