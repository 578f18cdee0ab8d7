"""Commands, called as a shell would."""

import re

from click.testing import CliRunner


def invoke(command, *arguments, spaces: str = r"\s+") -> tuple[int, str]:
    """(exit code, output with one space for each run of `spaces`). An exception that is no exit fails the test."""
    result = CliRunner().invoke(command, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, re.sub(spaces, " ", result.output)
