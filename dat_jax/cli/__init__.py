"""Command-line interface: flags, errors, console output and files of the commands."""
