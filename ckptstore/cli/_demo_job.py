"""The training job of ``ckptstore demo``: what a user would write. It knows nothing of being watched, killed or compared.

``python -m ckptstore.cli._demo_job URL DATA LOG`` trains from wherever the store says to the end.
"""

from __future__ import annotations

import json
import sys
import warnings

import ckptstore

__all__ = ["EPOCHS", "SAVE_EVERY", "STEPS", "TRAINING", "train"]

TRAINING = 1500  # of the 1797 digits; it is tested on the rest
BATCH = 64
WIDTH = 1024
EPOCHS = 3
STEPS = EPOCHS * -(-TRAINING // BATCH)
SAVE_EVERY = 7


def train(url: str, data: str, log: str) -> None:
    """Train with the store at `url` on the images in the .npz file `data`. What each step was trained on goes to the end of the file
    `log`, as a line of JSON."""
    import numpy as np  # here, because importing this module must be quick
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    # The same numbers in every process: one seed, one thread, no operation whose result depends on timing.
    torch.manual_seed(1)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    digits = np.load(data)
    images = torch.from_numpy(digits["images"]).float() / 16
    labels = torch.from_numpy(digits["labels"])
    training = TensorDataset(images[:TRAINING], labels[:TRAINING], torch.arange(TRAINING))

    model = nn.Sequential(
        nn.Linear(64, WIDTH), nn.ReLU(), nn.Dropout(0.2), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)

    sampler = ckptstore.InterruptableSampler(training, seed=1)
    loader = DataLoader(training, BATCH, sampler=sampler)

    def score() -> float:
        model.eval()
        right = model(images[TRAINING:]).argmax(1) == labels[TRAINING:]
        model.train()
        return float(right.float().mean())

    store = ckptstore.Store(url)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    checkpoint = store.resume(state, sampler=sampler)
    step = 0 if checkpoint is None else checkpoint.step or 0
    if checkpoint is None:
        print("the store is empty: training starts at the beginning")
    else:
        print(f"resumed from step {step}: epoch {sampler.epoch + 1}, {sampler.consumed} of {TRAINING} samples already seen")

    with open(log, "a", buffering=1) as lines:
        print(json.dumps({"resumed": step}), file=lines)
        for epoch in range(sampler.epoch, EPOCHS):
            with sampler.in_epoch(epoch):
                for x, y, samples in sampler.track(loader):
                    loss = nn.functional.cross_entropy(model(x), y)
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    scheduler.step()
                    step += 1
                    print(json.dumps({"step": step, "epoch": epoch, "samples": samples.tolist()}), file=lines)
                    if step % SAVE_EVERY == 0 or step == STEPS:
                        store.save(state, "latest", step=step, sampler=sampler, metrics={"loss": loss}, rng=True)
            print(f"epoch {epoch + 1} of {EPOCHS} done: reads {score():.1%} of {len(images) - TRAINING} other digits correctly")


if __name__ == "__main__":
    warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}\n"
    train(*sys.argv[1:])
