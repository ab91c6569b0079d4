"""Two gloo processes: per-step logits through DistributedDataParallel, SyncBatchNorm over T * N of both ranks."""

import copy
import multiprocessing
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from psn_train.models.sew_resnet import SEWResNet
from psn_train.neurons import PSN, kernels

pytestmark = pytest.mark.distributed
RANKS = 2


def build(neuron="lif"):
    torch.manual_seed(0)
    model = SEWResNet(10, neuron, stem="3x3", width=4, num_classes=3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 0.7)
    return model


def batch():
    return torch.randn(4, 2 * RANKS, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.double)


class AllReduce(torch.autograd.Function):
    """A sum over ranks whose gradient is the sum over ranks."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


def cpu_sync_batch_norm(self, x):
    """torch's SyncBatchNorm refuses CPU tensors; this is its training equation, for x [B, C, H, W]."""
    assert x.ndim == 4 and x.shape[1] == self.num_features
    if not self.training:
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
    count = torch.tensor(float(x.numel() // x.shape[1]), dtype=x.dtype)
    total = AllReduce.apply(torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3)), count.expand(x.shape[1])]))
    mean = total[0] / total[2]
    var = total[1] / total[2] - mean.square()
    with torch.no_grad():
        n = total[2]
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * n / (n - 1), self.momentum)
    scale = self.weight / (var + self.eps).sqrt()
    return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


class JoinedLayer(nn.Module):
    """Batch norm and PSN in one, y [T, N, C, H, W]."""

    def __init__(self, sync=False):
        super().__init__()
        self.norm = (nn.SyncBatchNorm if sync else nn.BatchNorm2d)(3)
        self.neuron = PSN(4)
        with torch.no_grad():
            self.norm.bias.fill_(0.7)

    def forward(self, y):
        return self.neuron(y, norm=self.norm)


def worker(rank, port, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    try:
        x = batch()
        mine = x[:, 2 * rank : 2 * rank + 2]

        # per-step logits and gradients through DDP, statistics of batch norm frozen
        model = build("psn").double().eval()
        ddp = DistributedDataParallel(copy.deepcopy(model))
        logits = ddp(mine, per_step=True)
        logits.square().mean().backward()
        model(x, per_step=True).square().mean().backward()
        whole = dict(model.named_parameters())
        same = all(torch.allclose(p.grad, whole[n].grad, atol=1e-12) for n, p in ddp.module.named_parameters())

        # batch norm over both ranks equals batch norm of the whole batch in one process
        nn.SyncBatchNorm.forward = cpu_sync_batch_norm
        single = build().double()
        synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(single))
        left = [type(m).__name__ for m in synced.modules() if type(m) is nn.BatchNorm2d]
        out, expected = synced(mine, per_step=True), single(x, per_step=True)[:, 2 * rank : 2 * rank + 2]
        buffers = dict(single.named_buffers())
        drift = max((b - buffers[n]).abs().max().item() for n, b in synced.named_buffers() if "running" in n)
        # joined with the neuron: the same of the kernels' own statistics and gradients, of unequal parts of the batch
        torch.manual_seed(2)
        alone = JoinedLayer().double()
        together = JoinedLayer(sync=True).double()
        together.load_state_dict(alone.state_dict())
        own = slice(0, 3) if rank == 0 else slice(3, 4)
        whole, part = (images.clone().requires_grad_() for images in (x, x[:, own]))
        with kernels.using_backend("compiled"):
            whole_spikes, spikes = alone(whole), together(part)
            whole_spikes.cos().mul(whole).sum().backward()
            spikes.cos().mul(part).sum().backward()
        joined = [(spikes - whole_spikes[:, own]).abs().max(), (part.grad - whole.grad[:, own]).abs().max()]
        for ours, theirs in zip(together.parameters(), alone.parameters(), strict=True):
            dist.all_reduce(ours.grad)
            joined.append((ours.grad - theirs.grad).abs().max())
        pairs = zip(together.buffers(), alone.buffers(), strict=True)
        joined += [(ours - theirs).abs().max() for ours, theirs in pairs]
        results[rank] = {
            "joined": [float(far) for far in joined],
            "spikes": float(spikes.detach().mean()),
            "shape": tuple(logits.shape),
            "same_gradients": same,
            "plain_norms_left": left,
            "drift": drift,
            "error": (out - expected).abs().max().item(),
            "moved": (synced.layer1[0].bn1.running_mean.abs().max().item()),
        }
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with multiprocessing.Manager() as manager:
        shared = manager.dict()
        # a server that imports once and forks the ranks: half the start-up of two fresh interpreters
        multiprocessing.set_forkserver_preload(["psn_train.models"])
        start_processes(worker, (port, shared), nprocs=RANKS, start_method="forkserver")
        return dict(shared)


@pytest.mark.long
def test_per_step_logits_pass_through_ddp_with_the_right_gradients(results):
    assert set(results) == {0, 1}
    assert all(r["shape"] == (4, 2, 3) and r["same_gradients"] for r in results.values())


def test_sync_batch_norm_takes_its_statistics_over_steps_and_ranks(results):
    for r in results.values():
        assert r["plain_norms_left"] == [] and r["moved"] > 1e-3
        assert r["drift"] < 1e-10 and r["error"] < 1e-10


def test_batch_norm_joined_with_the_neuron_takes_them_over_ranks_of_unequal_batches(results):
    for r in results.values():
        assert 0 < r["spikes"] < 1 and len(r["joined"]) > 6
        assert max(r["joined"]) < 1e-10, r["joined"]
