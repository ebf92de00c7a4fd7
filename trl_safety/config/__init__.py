"""Every option of every method, once."""
