"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in a setting, a path or a file, said in one sentence. ``main`` prints it and exits with status 1."""
