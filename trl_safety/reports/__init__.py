"""The safety report: what it says, and how it gets beside every saved adapter."""
