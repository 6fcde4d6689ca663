"""What inference engines load."""
