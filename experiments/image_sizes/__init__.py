"""Images of many sizes in few arrays."""
