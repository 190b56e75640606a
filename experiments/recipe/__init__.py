"""Switches of the training recipe on the quickstart."""
