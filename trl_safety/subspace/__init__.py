"""What alignment changed: built from a pair, kept in a file, applied by the methods."""
