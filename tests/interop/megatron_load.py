"""Has Megatron-Core's models load legacy files into ranks of their own, and compares what they then hold.

    python -m tests.interop.megatron_load FOLDER --kind llama --tensor 2 --pipeline 2

FOLDER holds an iteration of what `megatron_make` gives a model of this kind, whoever wrote it: each rank's
model takes the "model" of its file, strictly, as Megatron-LM's load_checkpoint has it. It needs an
environment that has megatron-core.
"""

import argparse
import math
import warnings
from pathlib import Path

import torch
from torch.multiprocessing.spawn import spawn

from tests.interop.megatron_dist_load import same
from tests.interop.megatron_make import begin, fill, folder_of, models_of, parser_of


def run(rank: int, options: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")
    begin(rank, options)
    (model,) = models_of(options)
    fill(model, "")
    wanted = {name: one.detach().bfloat16() for name, one in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data.zero_()
    model.bfloat16()
    file = Path(options.out, folder_of(options), "model_optim_rng.pt")
    tree = torch.load(file, weights_only=False)
    missing, unexpected = model.load_state_dict(tree["model"], strict=False)
    assert not unexpected, unexpected
    assert all(name.endswith("_extra_state") for name in missing), missing
    for name, parameter in model.named_parameters():
        same(name, parameter, wanted[name], slice(None))
    assert tree["args"].tensor_model_parallel_size == options.tensor
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    options = parser_of().parse_args()
    spawn(run, (options,), math.prod((options.tensor, options.pipeline, options.expert)))
