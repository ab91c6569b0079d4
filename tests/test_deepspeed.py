"""The network inside DeepSpeed's engine: per-step logits from one forward, and gradients that move the neurons."""

import os
import socket

import pytest
import torch

pytestmark = pytest.mark.slow


def test_per_step_logits_pass_through_the_engine(monkeypatch):
    deepspeed = pytest.importorskip("deepspeed", reason="pip install psn-train[deepspeed]")
    import timm

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    single = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for key, value in {**single, "DS_ACCELERATOR": "cpu"}.items():
        monkeypatch.setitem(os.environ, key, str(value))
    # the shared-memory operator would be compiled for a minute, and one process has nobody to talk to
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
    torch.manual_seed(0)
    model = timm.create_model("sew_resnet10_psn", T=3, num_classes=5, stem="3x3", width=8)
    images = torch.randn(2, 3, 16, 16)
    expected = model.train()(images, per_step=True)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    deepspeed.init_distributed(dist_backend="gloo")
    try:
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            config={
                "train_micro_batch_size_per_gpu": 2,
                "gradient_clipping": 0.0,
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {"stage": 1},
            },
        )
        logits = engine(images, per_step=True)
        assert logits.shape == (3, 2, 5)
        torch.testing.assert_close(logits, expected)
        engine.backward(logits.square().mean())
        engine.step()
        moved = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
        assert "sn1.weight" in moved and "conv1.weight" in moved and "fc.bias" in moved
    finally:
        torch.distributed.destroy_process_group()
