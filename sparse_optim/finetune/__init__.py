"""Fine-tune a transformers model with a selective optimizer: the main job of `sparse-optim`.

`sparse_optim.finetune.job.run(FinetuneConfig(...))` runs the job, as the command does. It is not
imported here: it imports transformers, and `sparse-optim --help` should not wait for that.
"""

from sparse_optim.finetune.config import FinetuneConfig, parse_budget
from sparse_optim.finetune.errors import FinetuneError

__all__ = ["FinetuneConfig", "FinetuneError", "parse_budget"]
