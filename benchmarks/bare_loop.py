"""The training loop that one would write by hand, for `bench_train.py` to compare with: torchvision's data recipe, SGD.

    python bare_loop.py MODEL EPOCHS BATCH WORKERS

CIFAR10 is read as torchvision reads it; `timed_script.py` puts other images in its place.
"""

from __future__ import annotations

import sys

import timm
import torch
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def main() -> None:
    name, epochs, batch_size, workers = sys.argv[1], *map(int, sys.argv[2:5])
    steps = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    augmented = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *steps])
    train = datasets.CIFAR10("data", train=True, transform=augmented)
    test = datasets.CIFAR10("data", train=False, transform=transforms.Compose(steps))
    train_loader = DataLoader(train, batch_size, shuffle=True, num_workers=workers, drop_last=True)
    test_loader = DataLoader(test, 256, num_workers=workers)
    model = timm.create_model(name, num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(train_loader))
    for epoch in range(epochs):
        model.train()
        for images, labels in train_loader:
            loss = functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        right = 0
        with torch.inference_mode():
            for images, labels in test_loader:
                right += int((model(images).argmax(1) == labels).sum())
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, accuracy {right / len(test):.2%}")
    torch.save(model.state_dict(), "model.pt")


if __name__ == "__main__":
    main()
