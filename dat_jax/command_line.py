"""What the programs of the package share: flags are read, and mistakes end with one sentence and status 1."""

import sys
from typing import NoReturn

from absl import flags


def fail(message: str) -> NoReturn:
    """Ends the program with a sentence on stderr and status 1."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


def parse_flags(argv: list[str]) -> list[str]:
    """Reads the flags, as absl's ``app.run`` wants it; a mistake in them ends the program with one sentence."""
    try:
        return flags.FLAGS(argv)
    except Exception as error:  # of the flags, and whatever a configuration's own code raises
        # ml_collections says an unknown key as '\'key\'\nDid you mean ...'
        message = " ".join(str(error.args[0] if error.args else error).replace("\\n", " ").split())
        fail(f"Flags: {message.strip(chr(34))}")
