"""What each of two gloo processes runs: the same trainings, with half of each batch."""

import os
import sys
from pathlib import Path

import torch
from integration.test_training import SHARDED, batches, step_twice
from torch.distributed.fsdp import fully_shard
from trainers import model, trained, trainer

folder = Path(sys.argv[1])
run = trainer(model(), folder / "run", max_steps=2, per_device_train_batch_size=2)
run.train()
mine = trained(run.model)
for value in mine.values():
    both = [torch.empty_like(value) for _ in range(2)]
    torch.distributed.all_gather(both, value)
    assert torch.equal(*both), "the ranks drifted apart"
surgery, mesh = model(SHARDED), torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
for block in surgery.get_base_model().model.layers:
    fully_shard(block, mesh=mesh)
fully_shard(surgery.get_base_model(), mesh=mesh)
step_twice(surgery, [batches()[torch.distributed.get_rank()]])
parts = {name: p.full_tensor().detach() for name, p in surgery.named_parameters() if p.requires_grad}
if run.is_world_process_zero():
    torch.save({"ranks": torch.distributed.get_world_size(), "parameters": mine, "sharded": parts}, folder / "two.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
os._exit(0)  # a thread of gloo may still run, and the interpreter would abort over it on its way out
