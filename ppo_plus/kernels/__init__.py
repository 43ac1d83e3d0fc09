"""What replaces another library's forward, or decides how much runs at once."""
