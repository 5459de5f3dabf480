"""How stages are run. A backend knows stages, units and barriers, and nothing of what they compute."""
