"""Run the whole GPU report, on your own card: python -m bench.gpu [--dry-run]   (make gpu-report)

Builds the extension, runs the GPU tests and checks (also under compute-sanitizer, if it is
installed), profiles the kernels with ncu, if it is installed, and measures steps, stages, whole
training steps, memory and bandwidth, the most important first. Writes results as they arrive to
bench/results/gpu-<card>-<date>.json, or to the folder in the environment variable OUT. Prints
tables, the goals and the status of all phases. Does not change the card's settings.

`python -m bench.gpu_first` and `python -m bench.gpu_second` run the most important phases in less
than five minutes each.

--dry-run does the same on the CPU with tiny shapes, to test the report itself.
"""

from bench import gpu_runner

PATIENCE = 4.0  # the limits are those of an H200

if __name__ == "__main__":
    gpu_runner.report(gpu_runner.WHOLE, __doc__, None, minutes=None, patience=PATIENCE)
