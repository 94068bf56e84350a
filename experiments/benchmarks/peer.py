"""The same shape on PyTorch's own layers, eager: what another trainer gets of this machine.

`throughput --peer PYTHON` starts this file in an interpreter that has PyTorch, and speaks to it by lines of JSON. The
model is the one that nanoGPT trains (Karpathy 2022): PreNorm, learned positions, fused q, k and v, PyTorch's scaled
dot product attention, exact GELU, clipping and AdamW; no layer has a bias. It imports nothing of this package.
"""

import json
import os
import statistics
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int, ffn_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.before_attn, self.before_ffn = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.ffn_in, self.ffn_out = nn.Linear(width, ffn_dim, bias=False), nn.Linear(ffn_dim, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(self.before_attn(x)).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).reshape(B, T, D))
        return x + self.ffn_out(F.gelu(self.ffn_in(self.before_ffn(x))))


class Model(nn.Module):
    def __init__(self, depth: int, width: int, num_heads: int, ffn_dim: int, vocab_size: int, seq_len: int):
        super().__init__()
        self.embed, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(seq_len, width)
        self.blocks = nn.Sequential(*(Block(width, num_heads, ffn_dim) for _ in range(depth)))
        self.final, self.head = nn.LayerNorm(width, bias=False), nn.Linear(width, vocab_size, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.positions(torch.arange(tokens.shape[1]))
        return self.head(self.final(self.blocks(x)))


def matmul_peak(n: int = 2048) -> float:
    """FLOP/s of a large square matmul: the best of several."""
    a = torch.ones(n, n)
    times = []
    for _ in range(12):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    return 2 * n**3 / statistics.median(sorted(times)[:5])


def main() -> None:
    """Says what it is, then answers each number of steps with the seconds that one of them took."""
    shape = json.loads(sys.argv[1])
    batch_size, seq_len = shape.pop("batch_size"), shape["seq_len"]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    model = Model(**shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.randint(shape["vocab_size"], (batch_size, seq_len + 1))

    def step() -> None:
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    num_params = sum(p.numel() for p in model.parameters())
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "num_params": num_params}
    print(json.dumps(facts | {"matmul_flops_per_s": matmul_peak()}), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            step()
        print((time.perf_counter() - began) / int(line), flush=True)


if __name__ == "__main__":
    main()
