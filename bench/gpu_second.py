"""Run the second call on a GPU, at most five minutes: python -m bench.gpu_second [--dry-run]

Measures time and memory of whole training steps of a 7B model with each kind of optimizer, and the
peak in the memory of smaller cards; then sampled gradients against cuBLAS and the selection against
torch.topk.

Needs no make, pip, git or network; `python -m bench.gpu_prepare` prepares the checkout for that.
Writes results as they arrive to the folder in the environment variable OUT, if it is set
(gpu-second.json and gpu-second.log), else to .gpu/. --only PHASE ... runs some phases.

--dry-run does the same on the CPU with tiny shapes.
"""

from bench import gpu_plan, gpu_runner

if __name__ == "__main__":
    gpu_runner.report("gpu-second", __doc__, gpu_plan.SECOND, minutes=4.75)
