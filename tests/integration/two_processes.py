"""What each of two gloo processes runs: the same training, with half of each batch."""

import os
import sys
from pathlib import Path

import torch
from integration.test_training import model, trained, trainer

folder = Path(sys.argv[1])
run = trainer(model(), folder / "run", max_steps=2, per_device_train_batch_size=2)
run.train()
mine = trained(run.model)
for value in mine.values():
    both = [torch.empty_like(value) for _ in range(2)]
    torch.distributed.all_gather(both, value)
    assert torch.equal(*both), "the ranks drifted apart"
if run.is_world_process_zero():
    torch.save({"ranks": torch.distributed.get_world_size(), "parameters": mine}, folder / "two.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
os._exit(0)  # a thread of gloo may still run, and the interpreter would abort over it on its way out
