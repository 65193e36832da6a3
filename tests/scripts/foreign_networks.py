"""Networks as other people write them: layers held twice, read elsewhere, used several times."""

import functools

import torch
import torch.nn.functional as F
from torch import nn


class PlainList(nn.Module):
    """Goes through a plain list of its layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.steps = {"layers": [self.a, (self.b,)]}

    def forward(self, x):
        a, (b,) = self.steps["layers"]
        return b(torch.tanh(a(x)))


class BoundForward(nn.Module):
    """Keeps a bound forward, and one inside a partial."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.first, self.second = self.a.forward, functools.partial(self.b.forward)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class TiedDictionary(nn.Module):
    """Reads the weight of its layer again, transposed."""

    def __init__(self):
        super().__init__()
        self.dictionary = nn.Linear(8, 16, bias=False)

    def forward(self, x):
        return F.linear(torch.relu(self.dictionary(x)), self.dictionary.weight.t())


class Attention(nn.Module):
    """Never calls its layers, whose weights it takes apart (BEiT, SwinV2)."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = F.linear(x, self.qkv.weight).chunk(3, -1)
        attended = torch.softmax(q @ k.mT, -1) @ v
        return torch.addmm(self.out.bias, attended, self.out.weight.T)


class SharedBlock(nn.Module):
    """One block, K times: the commonest way to unroll."""

    def __init__(self, iterations=3):
        super().__init__()
        block = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8, bias=False))
        self.iterations = nn.ModuleList([block] * iterations)

    def forward(self, x):
        for block in self.iterations:
            x = x + block(x)
        return x


class TiedParameter(nn.Module):
    """One parameter in two modules."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(8, 8), nn.Linear(8, 8)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(torch.relu(self.encoder(x)))


class IteratesChildren(nn.Module):
    """Calls whatever its children are."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        for child in self.children():
            x = torch.tanh(child(x))
        return x


class KeepsOutput(nn.Module):
    """Keeps an output with its graph, which deepcopy refuses."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        self.last = {"output": self.layer(x)}
        return self.last["output"]


class Subclassed(nn.Linear):
    """A layer of a class of its own, which does more with its weight."""

    def forward(self, x):
        return super().forward(x) + self.weight.mean()


class UsesSubclass(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Subclassed(8, 8)

    def forward(self, x):
        return self.layer(x)


# Each takes (batch, 8). All its matrices are one-bit.
NETWORKS = (
    PlainList,
    BoundForward,
    TiedDictionary,
    Attention,
    SharedBlock,
    TiedParameter,
    IteratesChildren,
    KeepsOutput,
)
