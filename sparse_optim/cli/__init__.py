"""The command line: everything that imports typer."""
