"""Run the first call on a GPU, at most five minutes: python -m bench.gpu_first [--dry-run]

Builds the extension while the kernels are checked without torch (also under compute-sanitizer),
runs the tests of both GPU backends, and measures bandwidth, steps, every operation and the variants
of the scan; ncu profiles the kernels that move the most bytes.

Needs no make, pip, git or network; `python -m bench.gpu_prepare` prepares the checkout for that.
Writes results as they arrive to the folder in the environment variable OUT, if it is set
(gpu-first.json and gpu-first.log), else to .gpu/. --only PHASE ... runs some phases.

--dry-run does the same on the CPU with tiny shapes.
"""

from bench import gpu_plan, gpu_runner

if __name__ == "__main__":
    gpu_runner.report("gpu-first", __doc__, gpu_plan.FIRST, minutes=4.75)
