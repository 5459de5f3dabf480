"""One file for each thing that a user asks for."""
