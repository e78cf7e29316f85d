"""The papers' experiments, and a quality table on real text, as resumable commands.

An experiment is a list of cells. A cell is one fine-tuning run (task, method, budget, learning
rate, seed) and writes one JSON file. `sparse-optim experiment NAME` runs the missing cells and
writes the table.
"""
