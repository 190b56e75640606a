"""Pictures of docs/attention.md."""
