"""The embedded world: a tiny base/aligned pair trained on the spot, to show every method at work without a download."""
