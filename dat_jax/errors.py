"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in a setting, a path or a file, said in one sentence. ``main`` prints it and exits with status 1."""


def name_some(names: list[str]) -> str:
    """The first five, and how many more."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
