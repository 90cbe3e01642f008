# SPDX-License-Identifier: Apache-2.0
"""What each process of `test_distributed.py` runs: python gloo_composition.py RANK RANKS STORE OUT."""

import os
import sys

import torch
import torch.distributed as dist
from gloo_sweep import late_sweep, sweeps, watched_sweeps
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleOutput, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from perceptriton.mlp import MLP, fuse_

# rows, widths: one size that a CPU runs as plain operations, one that has an autograd node of its own
SIZES = {"small": (16, (6, 8, 4)), "large": (2048, (256, 256, 256))}


def sequential(size):
    """The nn model that all others stand for."""
    torch.manual_seed(1)
    i, h, o = SIZES[size][1]
    model = nn.Sequential(nn.Linear(i, h), nn.Sigmoid(), nn.Linear(h, o), nn.Sigmoid())
    with torch.no_grad():
        # Gradients of a default-initialized sigmoid net are so small that none at all would pass.
        for p in model.parameters():
            p.mul_(3)
    return model


def mlp(size):
    model = MLP(SIZES[size][1])
    model.load_state_dict(sequential(size).state_dict())
    return model


def fused(size):
    model = sequential(size)
    fuse_(model)
    return model


MODELS = {"mlp": mlp, "fused": fused}


def shard_all(model, mesh):
    return fully_shard(model, mesh=mesh)


def shard_layers(model, mesh):
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def shard_in_bfloat16(model, mesh):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def tensor_parallel(**plans):
    return lambda model, mesh: parallelize_module(model, mesh, {name[1:]: plan for name, plan in plans.items()})


# Each process has its half of the batch.
DATA_PARALLEL = {
    "ddp": lambda model, mesh: DistributedDataParallel(model),
    "fsdp": shard_all,
    "fsdp-layers": shard_layers,
    "fsdp-bf16": shard_in_bfloat16,
}
# Each process has its part of the weights. A rowwise layer has sums of products that are not complete yet: its sigmoid
# has to wait for those of the others.
TENSOR_PARALLEL = {
    "colwise": tensor_parallel(
        _0=ColwiseParallel(output_layouts=Replicate()), _2=ColwiseParallel(output_layouts=Replicate())
    ),
    "colwise-rowwise": tensor_parallel(_0=ColwiseParallel(), _2=RowwiseParallel()),
    "rowwise": tensor_parallel(
        _0=RowwiseParallel(input_layouts=Replicate()), _2=RowwiseParallel(input_layouts=Replicate())
    ),
    "rowwise-scattered": tensor_parallel(
        _2=RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0)),
        _3=PrepareModuleOutput(output_layouts=Shard(0), desired_output_layouts=Replicate()),
    ),
}


def whole(tensor):
    # A copy: the tensor may be one that a collective is still at work on.
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(model, size, rank=0, ranks=1):
    """The outputs on all data after three steps, and the parameters. Each rank takes its share of the batch."""
    rows, widths = SIZES[size]
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(rows, widths[0], generator=generator), torch.rand(rows, widths[-1], generator=generator)
    mine = slice(rank, None, ranks)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        # Summed over outputs: a mean over them leaves gradients that nobody would miss.
        loss = (model(x[mine]) - y[mine]).square().sum(-1).mean()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return [whole(model(x)), *map(whole, model.parameters())]


def main(rank, ranks, store, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    mesh = dist.init_device_mesh("cpu", (ranks,))
    results = {}
    for size in SIZES:
        for name, make in MODELS.items():
            for case, wrap in DATA_PARALLEL.items():
                results[case, name, size] = train(wrap(make(size), mesh), size, rank, ranks)
            for case, wrap in TENSOR_PARALLEL.items():
                results[case, name, size] = train(wrap(make(size), mesh), size)
    results |= {"sweeps": sweeps(rank), "watched": watched_sweeps(rank), "late": late_sweep(rank)}
    torch.save(results, out)
    # Together with the other rank.
    dist.barrier()
    dist.destroy_process_group()
    # The threads of gloo may still run when an interpreter that ends in order destroys them, which aborts it.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
