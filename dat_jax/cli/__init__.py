"""Command lines: flags, error messages and console output."""
