"""`python -m sparse_optim` is the command `sparse-optim`."""

from sparse_optim.cli.main import main

main()
