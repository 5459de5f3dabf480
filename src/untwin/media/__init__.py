"""Media files: finding them, and decoding them in processes of their own."""
