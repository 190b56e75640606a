"""How long the steps of a configuration take to compile."""
