"""The papers' experiments, and a quality table on real text, as resumable commands.

An experiment is a list of cells; a cell is one fine-tuning run (task, method, budget, learning
rate, seed) and leaves one JSON file. `sparse-optim experiment NAME` runs what is missing and writes
the table.
"""
