"""Forward and training steps of whole models: time, memory, and where the time goes."""
