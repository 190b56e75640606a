"""Speed of the ops."""
