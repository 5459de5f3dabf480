"""`python -m untwin`."""

from untwin.cli import main

main()
