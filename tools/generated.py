"""Files of the repository that commands write from the package and from committed records."""

from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"

check_option = click.option("--check", is_flag=True, help="Write nothing; exit code 1 if the file is not current.")


def settle(path: Path, content: str | bytes, check: bool) -> None:
    """Writes the file unless it has this content. With `check` a ClickException says that it has not."""
    content = content.encode() if isinstance(content, str) else content
    if path.is_file() and path.read_bytes() == content:
        click.echo(f"{path} is current")
        return
    if check:
        raise click.ClickException(f"{path} is not what the package gives today: run the command without --check")
    try:
        path.write_bytes(content)
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from error
    click.echo(f"written: {path}")
