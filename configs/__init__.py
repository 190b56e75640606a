"""One ml_collections file a run; common.py holds what they share."""
