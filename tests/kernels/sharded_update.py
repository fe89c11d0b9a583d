"""Two ranks update shards as FSDP2 makes them; each compares with the update of the whole: torchrun -m …sharded_update."""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from sitfast.kernels.adamw_ema import adamw_ema, gradient_norm

SHAPES = [(6, 5), (7, 3), (1, 9), (3,)]  # even, uneven, and one whose second shard is empty


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for moments in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "emas")
        whole = {name: [torch.randn(shape, generator=generator).abs() for shape in SHAPES] for name in names}
        for name in ("exp_avgs", "exp_avg_sqs"):
            whole[name] = [x.to(moments) for x in whole[name]]
        split = {name: [distribute_tensor(x.clone(), mesh, [Shard(0)]) for x in whole[name]] for name in names}
        norms = []
        for tensors in (whole, split):
            norms.append(gradient_norm(tensors["grads"]))
            assert not hasattr(norms[-1], "to_local")
            adamw_ema(
                *(tensors[name] for name in names[:4]),
                torch.zeros(len(SHAPES)),
                emas=[tensors["emas"]],
                decays=[0.9],
                divisor=norms[0],
                lr=0.1,
                seed=3,
                step=7,
            )
        torch.testing.assert_close(norms[1], norms[0], rtol=1e-6, atol=0)
        assert any(x.to_local().numel() == 0 for x in split["params"]) == (dist.get_rank() == 1)
        for name in names:
            for a, b in zip(whole[name], split[name], strict=True):
                assert torch.equal(a, b.full_tensor()), name
    print("sharded updates agree", flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads can abort a process that takes them down


if __name__ == "__main__":
    main()
