"""What exists because a compiler is slow, each piece behind one plain function."""
