"""The embedded world: a tiny base/aligned pair made on the spot, so that every method can be seen at work with no download."""
