"""The HTML report: what it shows, and the page. No files of a run are read here."""
