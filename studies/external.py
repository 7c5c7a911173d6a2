"""A plain PyTorch training script that does not use muscale: an LSTM on the bytes of Python's standard library."""

import argparse
import json
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

# Bytes per sequence.
SEQ = 64

options = argparse.ArgumentParser()
options.add_argument("--lr", type=float, required=True)
options.add_argument("--tokens", type=int, required=True)
options.add_argument("--width", type=int, required=True)
options.add_argument("--batch", type=int, required=True)
options.add_argument("--seed", type=int, default=0)
args = options.parse_args()
torch.manual_seed(args.seed)

files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
text = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8).long()
split = len(text) * 9 // 10
train, held_out = text[:split], text[split:]


class LanguageModel(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.out = nn.Linear(width, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.lstm(self.embed(x))[0])


def windows(data: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    return torch.stack([data[s : s + SEQ + 1] for s in starts.tolist()])


def loss_on(batch: torch.Tensor) -> torch.Tensor:
    return cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def evaluate() -> float:
    with torch.no_grad():
        return loss_on(windows(held_out, torch.arange(64) * (len(held_out) // 65))).item()


model = LanguageModel(args.width)
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
# In sequences.
done, reported, total = 0, 0, args.tokens // SEQ
while done < total:
    # The last step may be smaller, so that the run has exactly the tokens that were asked for.
    size = min(args.batch, total - done)
    # The rate warms up over a twentieth of the run, then decays linearly to zero.
    for group in optimizer.param_groups:
        group["lr"] = args.lr * min((done + size) / (0.05 * total), (total - done) / (0.95 * total))
    loss = loss_on(windows(train, torch.randint(split - SEQ, (size,))))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    done += size
    if done == total or done - reported >= total / 10:
        point = {"tokens": done * SEQ, "loss": evaluate(), "train_loss": loss.item(), "final": done == total}
        print(json.dumps(point), flush=True)
        reported = done
